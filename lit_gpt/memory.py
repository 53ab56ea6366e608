"""How much memory this process needs, and a way to need less."""

import ctypes
import mmap
import resource
import sys
from functools import partial
from pathlib import Path

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


def recompute_blocks(model: GPT) -> None:
    """Activation checkpointing (Chen et al. 2016): each block keeps its input alone and runs again in the backward."""
    for block in model.h:
        block.forward = partial(recompute, block.forward, use_reentrant=False)
