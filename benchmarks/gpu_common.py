"""What the sections of gpu_check.py share: the check itself, models and rows at random, time and distance."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lit_gpt.files import write_json

TINY = {"n_layer": 3, "n_embd": 128, "n_head": 8, "head_size": 16, "intermediate_size": 256, "padded_vocab_size": 320}


@dataclass
class Check:
    """Holds what the sections share and what they found.

    Attributes:
        device: "cuda", or "cpu" in a dry run.
        folder: to write to.
        model: the name of the preset that speed and memory are measured with.
        failures: what must agree and did not, or ended in an error.
    """

    device: str
    folder: Path
    model: str
    results: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def dry(self) -> bool:
        return self.device == "cpu"

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            self.failures.append(what)
            print(f"  WRONG: {what}", flush=True)

    def write(self) -> None:
        write_json(self.folder / "gpu_check.json", {"results": self.results, "failures": self.failures})


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(action: Callable[[], Any], repeats: int) -> float:
    """Return the seconds of one of `repeats` calls, on the mean, after one that does not count."""
    action()
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        action()
    synchronize()
    return (time.perf_counter() - start) / repeats


def distance(a: Any, b: Any) -> float:
    """Return the distance of two tensors relative to the second's norm, float64 on the CPU."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def attached(gpt: Any, name: str, **settings: Any) -> Any:
    """Attach a method, with its own defaults but for `settings` that it has."""
    from lit_gpt.methods import registry

    config = registry.config_class(name)()
    known = {key: value for key, value in settings.items() if hasattr(config, key)}
    return registry.make_method(name, replace(config, **known)).attach(gpt)


def packed_row(lengths: list[int], vocabulary: int, seed: int = 0) -> Any:
    """Return samples of random tokens, their last halves supervised, packed into one row."""
    import torch

    from lit_gpt.data.dataset import Sample
    from lit_gpt.data.packing import pack

    generator, samples = torch.Generator().manual_seed(seed), []
    for n in lengths:
        tokens = torch.randint(vocabulary, (n,), generator=generator, dtype=torch.int32)
        samples.append(Sample(tokens, (torch.arange(n) >= n // 2).to(torch.uint8)))
    return pack(samples)


def random_gpt(check: Check, format: str | None = None) -> Any:
    """Make the model on the device in bfloat16, of normal weights with a standard deviation of 0.02."""
    import torch

    from lit_gpt import GPT, config_from_name
    from lit_gpt.model.gpt import quantize

    config = config_from_name(check.model)
    if check.dry:
        groups = 1 if config.n_query_groups == 1 else 2
        config = replace(config, **TINY, vocab_size=320, n_query_groups=groups, block_size=512)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(check.device):
            gpt = GPT(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in gpt.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
    return quantize(gpt, format) if format else gpt
