"""How a contestant's process is talked to; needs torch alone, for each runs in an environment of its own.

The process is started with the path of a JSON file, its job. Each optimizer step that it takes is asked for by a line
`{"step": n}` on stdin and answered by a line on stdout, so that contestants can take turns on the machine. Whatever
else is printed goes to stderr.
"""

import json
import math
import os
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Worker:
    """The contestant's end of the line."""

    def __init__(self) -> None:
        self.job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        self.device = torch.device(self.job["device"])
        self.answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.about: dict[str, Any] = {}

    def send(self, **answer: Any) -> None:
        print(json.dumps(answer), file=self.answers, flush=True)

    def loaded(self, model: torch.nn.Module, **about: Any) -> None:
        """To be called when the model is in memory, its adapters attached: what is needed beyond that is training's."""
        for tensor in model.parameters():  # weights that are mapped from a file count from here on
            tensor.detach().flatten()[::1024].sum()
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.about = {"trainable_parameters": trainable, "loading_peak_bytes": peak_bytes(self.device), **about}
        forget_peak(self.device)
        self.about["model_bytes"] = held_bytes(self.device)

    def steps(self) -> Iterator[int]:
        """The steps that are asked for. Advancing past one answers it, with what `result` was told."""
        self.send(ready=True, torch=torch.__version__, threads=torch.get_num_threads(), **self.about)
        for line in sys.stdin:
            start = time.perf_counter()
            yield json.loads(line)["step"]
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            loss = self.outcome[0]
            loss = loss.item() if isinstance(loss, Tensor) else loss
            self.send(loss=loss, tokens=self.outcome[1], seconds=seconds, peak_bytes=peak_bytes(self.device))

    def result(self, loss: Tensor | float, tokens: int) -> None:
        """The mean loss over the step's supervised tokens, and how many tokens were fed that predict another."""
        self.outcome = loss, tokens


def status_bytes(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else status_bytes("VmHWM")


def held_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else status_bytes("VmRSS")


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM becomes VmRSS


def first_A(job: dict[str, Any], layer: int, projection: str, in_features: int) -> Tensor:
    """LoRA's initial A of a projection, float32 (r, in_features): the same for every contestant."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{job['seed']}.{layer}.{projection}".encode()))
    bound = 1 / math.sqrt(in_features)
    return torch.empty(job["lora_r"], in_features).uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def set_A(job: dict[str, Any], parameter: Tensor, layer: int, projections: list[str]) -> None:
    """Fill an A that holds those of several projections, one below the other."""
    parameter.copy_(torch.cat([first_A(job, layer, name, parameter.size(1)) for name in projections]))
