"""Names devices and dtypes, and measures how much memory this process and its device hold."""

import ctypes
import mmap
import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_gpt.cores import usable_cores
from lit_gpt.errors import UsageError

if "OMP_NUM_THREADS" not in os.environ and usable_cores() < torch.get_num_threads():
    torch.set_num_threads(usable_cores())  # torch counts neither a container's limit nor two threads of a core as one

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MADV_HUGEPAGE = 14  # of Linux
MADV_PAGEOUT = 21  # of Linux 5.4 on
ALIGNMENT = 64  # bytes, a cache line


_peak_before_reset = 0  # the most memory held up to the last `reset_peak`, which the system then forgets


def peak_memory_bytes() -> int:
    """Return the most memory held at once so far: allocated on the GPU if it is used, else resident."""
    return max(_peak_before_reset, peak_since_reset())


def peak_since_reset() -> int:
    """Return the most memory, in bytes, held at once since the last `reset_peak`; on one of several GPUs."""
    if torch.cuda.is_initialized():
        return max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    if STATUS.exists():  # Linux
        return status_field("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def device_memory(device: torch.device) -> int:
    """Return how many bytes of memory the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def reset_peak(model: nn.Module) -> int:
    """Start a new peak, and return how many bytes are held now, with all of the model's weights."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and not hasattr(parameter, "full_tensor"):
            parameter.detach().sum()  # reads what is mapped from a file
    global _peak_before_reset
    _peak_before_reset = peak_memory_bytes()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not STATUS.exists():
        return peak_since_reset()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what was freed but not given back is not held
    CLEAR.write_text("5")
    return status_field("VmRSS")


def status_field(name: str) -> int:
    """Return a field of /proc/self/status, in bytes."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name)) * 1024


def page_out(tensor: Tensor) -> None:
    """Tell the kernel that a tensor which is mapped from a file is not needed soon, so that it need not stay resident.

    Its contents are kept, wherever it lies. Where the kernel does not know the request, nothing happens.
    """
    advise(tensor, MADV_PAGEOUT)


def advise(tensor: Tensor, advice: int) -> None:
    """Tell the kernel about the whole pages of a tensor, madvise(2)."""
    if tensor.device.type == "cpu" and sys.platform == "linux":
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(max(0, end - start)), advice)


def gathered(tensors: Iterable[tuple[str, Tensor]], layout: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors one behind the other into one allocation, for which the kernel takes large pages.

    To decode a token reads all weights once, and from pages of 4 KiB, mapped or of many allocations, a good part of
    that time goes into finding them.

    Args:
        tensors: on the CPU, by name; each is needed no more once the next is asked for.
        layout: tensors of the same shapes and dtypes, perhaps without contents; what it lacks, or has otherwise, is
            returned as it came.
    """
    offsets, end = {}, 0
    for name, like in layout.items():
        offsets[name], end = end, end + -(-like.nbytes // ALIGNMENT) * ALIGNMENT
    memory, found = torch.empty(end, dtype=torch.uint8), {}
    advise(memory, MADV_HUGEPAGE)
    for name, tensor in tensors:
        if name not in layout or (layout[name].shape, layout[name].dtype) != (tensor.shape, tensor.dtype):
            found[name] = tensor
            continue
        place = memory[offsets[name] : offsets[name] + tensor.nbytes]
        found[name] = place.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        page_out(tensor)
    return found


@contextmanager
def on_meta() -> Iterator[None]:
    """Create tensors on the meta device within the block, and leave those of modules uninitialized.

    To initialize them torch would import its compiler, which takes a second and 70 MB.
    """
    with torch.device("meta"), _NoInit():
        yield


class _NoInit(TorchFunctionMode):
    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if getattr(func, "__module__", None) == nn.init.__name__ else func(*args, **kwargs)


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_device(kind: str) -> torch.device:
    """Return the device that `--device` asks for: auto, cpu, cuda or mps (that of Apple's chips).

    Raises:
        UsageError: this machine has none, or torch was built without it.
    """
    if kind == "auto":
        return default_device()
    there: dict[str, Callable[[], bool]] = {
        "cpu": lambda: True,
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
    }
    if not there[kind]():
        found = ", ".join(name for name, is_there in there.items() if is_there())
        raise UsageError(f"--device {kind}: torch finds no such device here; expected auto, or what it finds: {found}")
    return torch.device(kind)


def multiply_in_tf32() -> None:
    """Let CUDA compute products of float32 in TF32, which keeps 11 of 24 bits of each factor and sums in float32.

    They are several times as fast, and still have more bits than in bfloat16.
    """
    torch.set_float32_matmul_precision("high")


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating dtype that a device sums in: Apple's chips have none of 64 bits."""
    return torch.float32 if device.type == "mps" else torch.float64
