"""Says where Triton kernels serve, and launches them."""

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lit_gpt.kernels.policy import policy

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def serves(*tensors: Tensor) -> bool:
    """Return whether Triton kernels serve tensors like these: on a CUDA device, all of one dtype of DTYPES.

    There are none while torch.compile traces, which makes its own.
    """
    first = tensors[0]
    return first.dtype in DTYPES and all(x.dtype == first.dtype for x in tensors) and serves_on(first)


def serves_on(x: Tensor) -> bool:
    """Return whether Triton kernels serve on this tensor's device, or on the one that is simulated on a CPU.

    There they are launched on fake tensors, which takes only their memory, or on real ones, by Triton's interpreter.
    """
    if torch.compiler.is_compiling():  # before the policy is asked for, at which torch.compile would break its graph
        return False
    if x.is_cuda:
        return policy().triton and _installed()
    return policy().triton and policy().simulate_cuda and (isinstance(x, FakeTensor) or interpreted())


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Return whether Triton runs kernels by its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1" and _installed()


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, stages: int = 3, **constants: Any
) -> None:
    """Run a kernel on the device of its first tensor; on fake tensors, which have no contents, nothing runs.

    Args:
        grid: how many programs, in up to three dimensions; with 0 in one of them nothing runs.
        arguments: tensors, which become pointers, and numbers.
        warps: of 32 threads each, that run a program.
        stages: loads that a loop with products has under way.
        constants: that the kernel is compiled for, by name.
    """
    for record in _records:
        record.append(Launch(kernel, grid, arguments, warps, stages, constants))
    first = next(x for x in arguments if isinstance(x, Tensor))
    if isinstance(first, FakeTensor) or 0 in grid:
        return
    with torch.cuda.device_of(first):
        kernel[grid](*arguments, num_warps=warps, num_stages=stages, **constants)


class Launch(NamedTuple):
    """What a kernel was to be launched with, see `launch`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    warps: int
    stages: int
    constants: dict[str, Any]

    @property
    def named(self) -> dict[str, Any]:
        """Return the arguments by the kernel's names for them."""
        return dict(zip(self.kernel.arg_names, self.arguments, strict=False))


_records: list[list[Launch]] = []


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Note every launch, on whichever thread, while the block runs; those on fake tensors too."""
    launches: list[Launch] = []
    _records.append(launches)
    try:
        yield launches
    finally:
        _records.remove(launches)
