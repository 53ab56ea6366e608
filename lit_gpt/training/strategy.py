"""Puts model and optimizer behind the strategy (one device, DDP, FSDP2, DeepSpeed)."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lit_gpt.distributed import deepspeed
from lit_gpt.distributed.sharding import gather, shard_like
from lit_gpt.training import optimizers
from lit_gpt.training.optimizers import InBackward, make_optimizer, optimizer_of


def setup(fabric: Fabric, model: nn.Module, hp: SimpleNamespace) -> tuple[nn.Module, Any]:
    """The model behind the strategy, and the optimizer of its parameters that train."""
    if isinstance(fabric.strategy, DeepSpeedStrategy):  # wants both together
        return fabric.setup(model, make_optimizer(trained(model), hp))
    wrapped = fabric.setup_module(model)
    optimizer = optimizer_of(trained(model), hp)
    return wrapped, optimizer if isinstance(optimizer, InBackward) else fabric.setup_optimizers(optimizer)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def maybe_no_sync(fabric: Fabric, wrapped: nn.Module, more: bool) -> Any:
    """The context of a backward pass. `more`: others follow before the optimizer steps, so ranks need not meet yet."""
    if isinstance(fabric.strategy, DeepSpeedStrategy):
        fabric.strategy.model.set_gradient_accumulation_boundary(not more)
        return nullcontext()
    return fabric.no_backward_sync(wrapped, enabled=more)


def optimizer_state(fabric: Fabric, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state, whole, so that it does not depend on the number of ranks. All ranks must ask together."""
    if isinstance(fabric.strategy, DeepSpeedStrategy):
        return deepspeed.optimizer_state(trained(model), optimizer)
    return tree_map(lambda leaf: gather(leaf) if isinstance(leaf, Tensor) else leaf, optimizer.state_dict())


def load_optimizer_state(
    fabric: Fabric, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    if isinstance(fabric.strategy, DeepSpeedStrategy):
        return deepspeed.load_optimizer_state(trained(model), optimizer, state)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for i, entries in state["state"].items():
        for name, entry in entries.items():
            if isinstance(entry, Tensor) and entry.shape == parameters[i].shape:
                entries[name] = shard_like(parameters[i], entry)
    return optimizer.load_state_dict(state)


def allocate(fabric: Fabric, optimizer: Any) -> None:
    """Let the optimizer make its state, by a step that changes no weight."""
    if not isinstance(fabric.strategy, DeepSpeedStrategy):  # which has made it already
        optimizers.allocate(optimizer)


def clear_optimizer_state(fabric: Fabric, optimizer: Any) -> None:
    """Take the optimizer's state back to its beginning."""
    (deepspeed if isinstance(fabric.strategy, DeepSpeedStrategy) else optimizers).forget(optimizer)
