"""Activation checkpointing: what a block keeps for the backward pass, from all to nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from lit_gpt.model.gpt import GPT

# How much each block keeps for the backward pass, from all to nothing on the device; all give the same gradients.
KINDS = ("none", "selective", "full", "offload")


def apply_activation_checkpointing(model: GPT, kind: str) -> None:
    """Let the blocks keep less, as `--activation_checkpointing` says.

    selective: what norms and gates give is made again in the backward pass, from their inputs, which are kept anyway.
    full: a block keeps its input alone and runs again in the backward pass (Chen et al. 2016).
    offload: the same, with the input in host memory until then.
    """
    for block in model.h:
        if kind == "selective":
            RecomputedOutputs(block)
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


class RecomputedOutputs:
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

    def pack(self, tensor: Tensor) -> "Tensor | Recompute":
        if (found := self.results.get(tensor.untyped_storage()._cdata)) is None:
            return tensor
        shape = tensor.size(), tensor.stride(), tensor.storage_offset()
        return Recompute(found[0], found[1], shape, torch.is_autocast_enabled(tensor.device.type))

    @staticmethod
    def unpack(kept: "Tensor | Recompute") -> Tensor:
        return kept.tensor() if isinstance(kept, Recompute) else kept


@dataclass(frozen=True)
class Recompute:
    function: Callable[[Tensor], Tensor]
    x: Tensor
    shape: tuple[Any, ...]  # size, stride and offset of the view that was saved
    autocast: bool

    @torch.no_grad()
    def tensor(self) -> Tensor:
        kind = self.x.device.type
        with torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=self.autocast):
            return self.function(self.x).as_strided(*self.shape)
