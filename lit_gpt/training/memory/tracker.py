"""Counts the bytes of all living storages."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lit_gpt.model.gpt import GPT


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of all storages made while it is on, as they come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.prim.device.default:  # asked for more often than everything else together
            return args[0].fake_device
        result = function(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self.count(leaf.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def during_passes(self, model: GPT, first: int, loss: Callable[[], Tensor]) -> tuple[int, int, int]:
        """Return the peaks of the forward pass, then up to the end of the last block's backward, and from block
        `first`'s on."""
        peaks = []

        def mark(gradient: Tensor | None) -> None:
            peaks.append(self.peak)
            self.peak = self.now

        def watch(block: nn.Module, arguments: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(mark)

        handles = [model.h[layer].register_forward_hook(watch) for layer in (-2, first)]
        self.peak = self.now
        total = loss()
        mark(None)
        total.backward()
        for handle in handles:
            handle.remove()
        forward, begins, *_ = (*peaks, self.peak)
        return forward, begins, self.peak

    def during(self, action: Callable[[], Any]) -> int:
        """Return the peak while `action` runs."""
        self.peak = self.now
        action()
        return self.peak
