"""Say what finetuning runs are started with, and read what they leave."""

import csv
import runpy
import subprocess
import time
from pathlib import Path

import pytest
import torch

from helpers.paths import ROOT
from lit_gpt import cli as command_line
from lit_gpt.checkpoints import io
from lit_gpt.methods.method import Method
from lit_gpt.methods.registry import config_class, make_method
from lit_gpt.model.config import Config
from lit_gpt.training.args import TrainArgs
from lit_gpt.training.memory.plan import MemoryPlanner
from lit_gpt.training.objectives import SupervisedFinetuning

STEPS = 12  # of the runs that `lora_flags` describes


def lora_flags(checkpoint_dir: Path, data_dir: Path, out_dir: Path) -> dict:
    """Return the flags of a short LoRA run."""
    return dict(
        checkpoint_dir=checkpoint_dir, data_dir=data_dir, out_dir=out_dir, precision="fp32", max_steps=STEPS,
        batch_size=6, micro_batch_size=3, warmup_steps=2, learning_rate=0.02, lora_dropout=0.1, lora_mlp="true",
        eval_interval=5, save_interval=1, sample_tokens=5,
    )  # fmt: skip


def parse_flags(method: str, **flags) -> tuple[Method, TrainArgs]:
    """Return a finetune script's method and arguments, for its flags as parsed."""
    script, groups = runpy.run_path(str(ROOT / "finetune" / f"{method}.py")), (config_class(method), TrainArgs)
    values = command_line.parse(script, [f"--{name}={value}" for name, value in flags.items()], groups)
    config, args = (command_line.build(group, values) for group in groups)
    return make_method(method, config), args


def planner_of(config: Config, method: str, cuda: bool = False, memory: int = 10**12, **flags) -> MemoryPlanner:
    """Return the planner of a run that the flags of a finetune script describe."""
    made, args = parse_flags(method, **flags)
    return MemoryPlanner(config, made, SupervisedFinetuning(), args, None, cuda, memory)


def final(out_dir: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a finished LoRA run."""
    return io.load(out_dir / "lit_model_lora_finetuned.pth")["state"]


def metrics(out_dir: Path) -> list[dict]:
    """Return the rows of metrics.csv without the columns that time and the machine decide."""
    with open(out_dir / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "peak_memory_bytes")}
                for row in csv.DictReader(file)]  # fmt: skip


def wait_for_step(process: subprocess.Popen, out_dir: Path, step: int) -> None:
    """Wait until a run has written the metrics of a step, for three minutes at most; a slower one is killed."""
    deadline = time.monotonic() + 180
    while not (out_dir / "metrics.csv").exists() or len(metrics(out_dir)) <= step:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(str(process.communicate()))
        time.sleep(0.001)


def method_flags(flags: dict, method: str) -> dict:
    """Return the flags of a LoRA run for another method."""
    flags = {k: v for k, v in flags.items() if not k.startswith("lora")} | {"learning_rate": 0.01}
    return flags if method == "full" else flags | {"adapter_start_layer": 0}


def weights_of(out_dir, method: str) -> dict:
    """Return the weights that a finished run of a method has saved."""
    if method == "full":
        return io.load(out_dir / "lit_model.pth")
    return io.load(out_dir / f"lit_model_{method}_finetuned.pth")["state"]


def of_method(flags: dict, method: str) -> dict:
    """Return the flags for a method and plain SGD: Adam would blow up the rounding of gradients near zero."""
    flags = dict(flags) if method == "lora" else method_flags(flags, method)
    return flags | {"optimizer": "sgd", "learning_rate": 0.05}


def same_run(one: Path, other: Path, method: str) -> None:
    """Assert that two runs went the same way and ended with the same weights, up to rounding."""
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert a["tokens"] == b["tokens"]
        for column in ("loss", "val_loss", "lr", "grad_norm"):
            assert float(a[column] or 0) == pytest.approx(float(b[column] or 0), rel=1e-5), (a, b)
    weights, others = weights_of(one, method), weights_of(other, method)
    assert all(torch.allclose(weights[name], others[name], rtol=1e-4, atol=1e-5) for name in weights)
