"""Applies activation checkpointing: what a block keeps for the backward pass, from all to nothing on the device.

Which kind serves is chosen by `plan.MemoryPlanner.choose_settings`.

All kinds give the same gradients.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_gpt.kernels.policy import bound_to_policy
from lit_gpt.model.gpt import GPT, Block, BlockExecution
from lit_gpt.model.norms import Residual, residual_stream
from lit_gpt.training.memory.offloading import Offloader

KINDS = ("none", "selective", "full", "offload")


def apply_activation_checkpointing(model: GPT, kind: str) -> None:
    """Let the blocks keep less, as `--activation_checkpointing` says.

    selective: the outputs of norms and activations are computed again in the backward pass, from their inputs, which
    are kept anyway.
    full: a block keeps its input alone and runs again in the backward pass (Chen et al. 2016).
    offload: as full, with the input in host memory until then.
    """
    executions: dict[str, Callable[[], BlockExecution]] = {
        "selective": RecomputedOutputs,
        "full": FullCheckpointing,
        "offload": partial(Offloading, Offloader()),
    }
    for block in cast(Iterable[Block], model.h):
        block.execution = executions.get(kind, BlockExecution)()


class FullCheckpointing(BlockExecution):
    """Keeps the block's input."""

    def run(self, block: Block, *inputs: Any) -> Tensor:
        return checkpoint(bound_to_policy(block.compute), *inputs, use_reentrant=False)


class Offloading(BlockExecution):
    """Keeps the block's input in host memory."""

    def __init__(self, offloader: Offloader) -> None:
        self.offloader = offloader  # of all blocks, one after the other

    def run(self, block: Block, *inputs: Any) -> Tensor:
        x, *shared = inputs  # by all blocks: these stay
        with torch.autograd.graph.saved_tensors_hooks(self.offloader.pack, self.offloader.unpack):
            return checkpoint(bound_to_policy(lambda x: block.compute(x, *shared)), x, use_reentrant=False)


class RecomputedOutputs(BlockExecution):
    """Keeps, in place of the outputs of a block's norms and activations, how to compute them again."""

    def __init__(self) -> None:
        # while the block runs: {storage of an output: (function, its input, its output)}
        self.outputs: dict[int, tuple[Callable[[Tensor], Tensor], Tensor, Tensor]] = {}

    def run(self, block: Block, *inputs: Any) -> Tensor:
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                return block.compute(*inputs)
        finally:
            self.outputs.clear()

    def add_and_norm(self, norm: nn.Module, x: Tensor, residual: Residual) -> tuple[Tensor, Tensor]:
        stream = residual_stream(x, residual)
        return stream, self.apply(norm, stream)

    def apply(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y = function(x)
        if torch.is_grad_enabled() and y is not x:
            # y is held too, so that nothing else gets its storage
            self.outputs[y.untyped_storage()._cdata] = function, x.detach(), y
        return y

    def pack(self, tensor: Tensor) -> "Tensor | Recompute":
        output = self.outputs.get(tensor.untyped_storage()._cdata)
        if output is None:
            return tensor
        view = tensor.size(), tensor.stride(), tensor.storage_offset()
        return Recompute(bound_to_policy(output[0]), output[1], view, torch.is_autocast_enabled(tensor.device.type))

    @staticmethod
    def unpack(kept: "Tensor | Recompute") -> Tensor:
        return kept.tensor() if isinstance(kept, Recompute) else kept


@dataclass(frozen=True)
class Recompute:
    """Computes a saved tensor again."""

    function: Callable[[Tensor], Tensor]
    x: Tensor
    view: tuple[Any, ...]  # size, stride and offset of the view that was saved
    autocast: bool

    @torch.no_grad()
    def tensor(self) -> Tensor:
        device = self.x.device.type
        with torch.autocast(device, torch.get_autocast_dtype(device), enabled=self.autocast):
            return self.function(self.x).as_strided(*self.view)
