"""How much memory this process needs, and ways to need less."""

import ctypes
import mmap
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from lit_gpt.model import GPT

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MADV_PAGEOUT = 21  # of Linux 5.4 on
_before = 0  # the peak up to the last `restart`


def peak_memory_bytes() -> int:
    """The most memory held at once so far: allocated on the GPU if there is one, else resident."""
    return max(_before, peak_since_restart())


def peak_since_restart() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if STATUS.exists():  # Linux
        return field("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def of_device(device: torch.device) -> int:
    """Bytes of memory that the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def restart(model: nn.Module) -> int:
    """Begin to look for a new peak; returns the memory that is held now, with all of the model's weights."""
    global _before
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and not hasattr(parameter, "full_tensor"):
            parameter.detach().sum()  # reads what is mapped from a file
    _before = peak_memory_bytes()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not STATUS.exists():
        return peak_since_restart()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what was freed but not given back is not held
    CLEAR.write_text("5")
    return field("VmRSS")


def field(name: str) -> int:
    """Bytes, from Linux's account of this process."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name)) * 1024


def release(tensor: Tensor) -> None:
    """Tell the kernel that a tensor which is mapped from a file is not needed soon, so that it need not stay resident.

    Its contents are kept, wherever it lies. Where the kernel does not know the request, nothing happens.
    """
    if tensor.device.type == "cpu" and sys.platform == "linux":
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(max(0, end - start)), MADV_PAGEOUT)


# How much each block keeps for the backward pass, from all to nothing on the device; all give the same gradients.
KINDS = ("none", "selective", "full", "offload")


def spare_activations(model: GPT, kind: str) -> None:
    """Let the blocks keep less, as `--activation_checkpointing` says.

    selective: what norms and gates give is made again in the backward pass, from their inputs, which are kept anyway.
    full: a block keeps its input alone and runs again in the backward pass (Chen et al. 2016).
    offload: the same, with the input in host memory until then.
    """
    for block in model.h:
        if kind == "selective":
            Remade(block)
        elif kind == "full":
            block.forward = partial(recompute, block.forward, use_reentrant=False)
        elif kind == "offload":
            block.forward = partial(offloaded, block.forward)


def offloaded(forward: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda x: to_host(x), lambda kept: from_host(kept)):
        return recompute(lambda x: forward(x, *rest), x, use_reentrant=False)  # the rest is shared by all blocks


def to_host(x: Tensor) -> tuple[torch.device, Tensor]:
    """In memory that the device reads by itself: nobody waits for the copy, which is in the device's order of work."""
    kept = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
    return x.device, kept.copy_(x, non_blocking=True)


def from_host(kept: tuple[torch.device, Tensor]) -> Tensor:
    return kept[1].to(kept[0], non_blocking=True)


class Remade:
    """Keeps, in place of what a block's norms and its gate or activation give, how to make that again."""

    def __init__(self, block: nn.Module) -> None:
        self.results: dict[int, tuple[Callable[[Tensor], Tensor], Tensor, Tensor]] = {}  # while the block runs
        for owner, name in ((block.norm_1, "forward"), (block.norm_2, "forward"), (block.mlp, "inner")):
            if owner is not None:
                setattr(owner, name, partial(self.note, getattr(owner, name)))
        block.forward = partial(self.run, block.forward)

    def run(self, forward: Callable[..., Tensor], *arguments: Any) -> Tensor:
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                return forward(*arguments)
        finally:
            self.results.clear()

    def note(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y = function(x)
        if torch.is_grad_enabled() and y is not x:
            self.results[y.untyped_storage()._cdata] = function, x.detach(), y  # y, so that its place is not used anew
        return y

    def pack(self, tensor: Tensor) -> "Tensor | Recipe":
        if (found := self.results.get(tensor.untyped_storage()._cdata)) is None:
            return tensor
        shape = tensor.size(), tensor.stride(), tensor.storage_offset()
        return Recipe(found[0], found[1], shape, torch.is_autocast_enabled(tensor.device.type))

    @staticmethod
    def unpack(kept: "Tensor | Recipe") -> Tensor:
        return kept.tensor() if isinstance(kept, Recipe) else kept


@dataclass(frozen=True)
class Recipe:
    function: Callable[[Tensor], Tensor]
    x: Tensor
    shape: tuple[Any, ...]  # size, stride and offset of the view that was saved
    autocast: bool

    @torch.no_grad()
    def tensor(self) -> Tensor:
        kind = self.x.device.type
        with torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=self.autocast):
            return self.function(self.x).as_strided(*self.shape)
