"""How a run spreads over devices, through Lightning Fabric: one, DDP, or FSDP2."""

from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import tree_map

from lit_gpt.errors import UsageError
from lit_gpt.generation import default_device
from lit_gpt.model import GPT
from lit_gpt.variants import shared_like, whole


def launch(hp: SimpleNamespace) -> Fabric:
    """Fabric for `--devices`, `--num_nodes` and `--strategy`, its processes started."""
    strategy: Any = hp.strategy
    if strategy == "fsdp":
        ranks = hp.devices * hp.num_nodes
        strategy = ModelParallelStrategy(shard, data_parallel_size=ranks, tensor_parallel_size=1)
    kind = default_device().type
    try:
        fabric = Fabric(accelerator=kind, devices=hp.devices, num_nodes=hp.num_nodes, strategy=strategy)
    except (MisconfigurationException, ValueError) as error:
        raise UsageError(f"--devices {hp.devices} --strategy {hp.strategy}: {error}") from None
    fabric.launch()
    return fabric


def shard(model: GPT, mesh: DeviceMesh) -> GPT:
    """FSDP2: each rank keeps its share of every block and gathers a block when it runs (Zhao et al. 2023)."""
    for block in model.h:
        fully_shard(block, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


def place_to_build(hp: SimpleNamespace, fabric: Fabric) -> torch.device:
    """Where to build the model: under FSDP on the CPU, mapped from the file, for sharding to move share by share."""
    return torch.device("cpu") if hp.strategy == "fsdp" else fabric.device


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state, whole, so that it does not depend on the number of ranks. All ranks must ask together."""
    return tree_map(lambda leaf: whole(leaf) if isinstance(leaf, Tensor) else leaf, optimizer.state_dict())


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for i, entries in state["state"].items():
        for name, entry in entries.items():
            if isinstance(entry, Tensor) and entry.shape == parameters[i].shape:
                entries[name] = shared_like(parameters[i], entry)
    optimizer.load_state_dict(state)
