"""Keeps tensors in host memory between forward and backward pass, copied while the device computes.

A tensor goes out while the block runs that takes it, and comes back while the backward pass of the block after it runs.
"""

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_gpt.kernels.policy import policy


class Copies(Protocol):
    """Copies between a device and host memory, in the order in which copies are asked for."""

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Start a copy of what has been computed so far, and return what `wait` takes."""

    def wait(self, copy: Any) -> None:
        """Let all that is computed from now on wait until a copy is there."""


class CopiesInOrder:
    """Copies at once, on a CPU; without contents nothing is copied."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        if policy().contents:
            target.copy_(source)

    def wait(self, copy: None) -> None:
        pass


class StreamCopies:
    """Copies on a CUDA stream of its own; the host waits for none."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, copy: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.stream.device).wait_event(copy)


class Offloader:
    """Packs and unpacks saved tensors, as hooks of autograd; they come back in the reverse of the order they left in.

    On the device one tensor is held beyond those in use, in either pass: what leaves until the next one leaves, what
    comes back from when the one after it is unpacked. Both stay until the stream that computes has waited for their
    copies, so that memory is used again in that stream's order. Tensors must not be changed in place once packed.

    Args:
        copies: what copies; by default what serves for the device of the first tensor.
    """

    def __init__(self, copies: Copies | None = None) -> None:
        self.copies = copies
        self.free: list[Tensor] = []  # host memory, page-locked for CUDA, for the next tensors: locking takes long
        self.last: weakref.ref[Offloaded] | None = None

    def pack(self, x: Tensor) -> "Offloaded":
        """Start to copy a tensor to the host."""
        if self.copies is None:
            self.copies = StreamCopies(x.device) if x.is_cuda else CopiesInOrder()
        before = self.last
        if before is not None and (offloaded := before()) is not None:
            offloaded.leave()
        kept = Offloaded(self, self.copies, x, before)
        self.last = weakref.ref(kept)
        return kept

    @staticmethod
    def unpack(kept: "Offloaded") -> Tensor:
        """Return a tensor on its device, and start to copy the one that was packed before it."""
        kept.fetch()
        if kept.before is not None and (before := kept.before()) is not None:
            before.fetch()
        return kept.arrived()

    def take(self, size: int, pinned: bool) -> Tensor:
        """Return host memory of at least so many bytes."""
        memory = self.free.pop() if self.free else None
        if memory is None or memory.numel() < size:
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        return memory


class Offloaded:
    """Holds a tensor in host memory, and on its device from the start of a copy until nobody needs it there."""

    def __init__(self, owner: Offloader, copies: Copies, x: Tensor, before: "weakref.ref[Offloaded] | None") -> None:
        self.owner, self.copies, self.before = owner, copies, before
        self.device, self.shape, self.dtype = x.device, x.shape, x.dtype
        self.x: Tensor | None = x
        # without contents what is counted is the device's memory
        self.memory = owner.take(x.nbytes, x.is_cuda) if policy().contents else None
        self.under_way: list[Any] = [copies.copy(self.on_host(), x)]  # the copy that nobody has waited for

    def on_host(self) -> Tensor:
        if self.memory is None:
            assert self.x is not None
            return self.x  # of which nothing is copied
        return self.memory[: self.shape.numel() * self.dtype.itemsize].view(self.dtype).view(self.shape)

    def settle(self) -> None:
        """Let the device wait for the copy that is under way."""
        while self.under_way:
            self.copies.wait(self.under_way.pop())

    def leave(self) -> None:
        """Leave the device."""
        self.settle()
        self.x = None

    def fetch(self) -> None:
        """Start to copy the tensor back, unless it is on its device or on the way."""
        if self.x is None:
            self.x = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self.under_way.append(self.copies.copy(self.x, self.on_host()))

    def arrived(self) -> Tensor:
        """Return the tensor, once it is there; it is the caller's to hold."""
        self.settle()
        x, self.x = self.x, None
        assert x is not None
        return x

    def __del__(self) -> None:
        self.leave()  # a pass that failed leaves copies under way
        if self.memory is not None:
            self.owner.free.append(self.memory)
