"""Which kernels may serve: the choice is a context, read where kernels are chosen."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def multiplies_bf16() -> bool:
    """Return whether torch's products of bfloat16 run by instructions of this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


WIDE_VECTORS = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@dataclass(frozen=True)
class KernelPolicy:
    """Says what the choice of kernels may rely on.

    Attributes:
        cpp: whether the C++ kernels may serve; else torch's formulas do.
        fused: whether C++ kernels take the place of torch's operators in training; by default each where a trial finds
            it faster, see lit_gpt.kernels.trials.
        triton: whether Triton kernels may take the place of torch's operators on CUDA.
        simulate_cuda: choose as on a CUDA device, for a plan on fake CPU tensors.
        contents: whether tensors have contents. Without, what depends on contents takes its most even case, and copies
            to host memory are left out.
        widen: whether a CPU computes products of 16 bits in float32; by default where it has no arithmetic for them.
        onednn: whether oneDNN computes products of float32 in place of MKL, which leaves half of the vectors of others'
            processors than Intel's unused; by default where a trial finds it faster.
    """

    cpp: bool = True
    fused: bool | None = None
    triton: bool = True
    simulate_cuda: bool = False
    contents: bool = True
    widen: bool = not multiplies_bf16()
    onednn: bool | None = None


_current: ContextVar[KernelPolicy] = ContextVar("lit_gpt kernel policy", default=KernelPolicy())  # noqa: B039 (frozen)


def policy() -> KernelPolicy:
    """Return the policy that holds here."""
    return _current.get()


@contextmanager
def use_policy(**changes: Any) -> Iterator[None]:
    """Let a policy hold that differs by `changes`, while the block runs."""
    token = _current.set(replace(policy(), **changes))
    try:
        yield
    finally:
        _current.reset(token)


def bound_to_policy(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return a function that runs under the policy which holds here.

    On CUDA a backward pass runs on threads of autograd's own, where the default holds. What it calls that chooses
    kernels, to compute again what the forward pass did, is bound in the forward pass.
    """
    here = policy()

    def bound(*args: Any, **kwargs: Any) -> Result:
        token = _current.set(here)
        try:
            return function(*args, **kwargs)
        finally:
            _current.reset(token)

    return bound
