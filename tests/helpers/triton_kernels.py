"""What the tests of Triton kernels share."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.compare import off
from helpers.paths import ROOT

NARROW, WIDE = torch.bfloat16, torch.float64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(*shapes: tuple[int, ...], frozen: tuple[int, ...] = ()) -> list[Tensor]:
    """Return normal tensors of numbers that all dtypes have, which want gradients but for the frozen ones."""
    torch.manual_seed(3)
    return [
        torch.randn(shape).to(NARROW).to(WIDE).to(DEVICE).requires_grad_(i not in frozen)
        for i, shape in enumerate(shapes)
    ]


def results(f: Callable[..., Tensor], given: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the result and the gradients of the inputs that want one."""
    given = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in given]
    y = f(*given)
    seed = torch.Generator().manual_seed(9)
    y.backward(torch.randn(y.shape, generator=seed, dtype=WIDE).to(NARROW).to(y.device, y.dtype))
    return [y.detach(), *(x.grad for x in given if x.requires_grad and x.grad is not None)]


def rounds_once(ours: Callable[..., Tensor], plain: Callable[..., Tensor], given: list[Tensor]) -> None:
    """Assert that results and gradients have the exact ones' values, with no more error than these have rounded."""
    exact = results(plain, given, WIDE)
    for dtype, bound in ((torch.float32, 1e-5), (NARROW, 0.0), (torch.float16, 1e-5)):
        found = results(ours, given, dtype)
        assert len(found) == len(exact)
        for actual, expected in zip(found, exact, strict=True):
            assert actual.dtype == dtype
            assert off(actual.double(), expected) <= 1.2 * off(expected.to(dtype).double(), expected) + bound


def compile_ahead(program: str, dtypes: str, capabilities: str, cache: Path) -> list[dict[str, Any]]:
    """Return the lines of a program of tests/helpers that compiles kernels; see helpers/ahead_of_time.py."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": paths}
    argv = [sys.executable, str(ROOT / "tests/helpers" / program), dtypes, capabilities]
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
