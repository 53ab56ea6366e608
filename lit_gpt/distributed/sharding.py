"""Shards a model over ranks by FSDP2."""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lit_gpt.distributed.fabric import Fabric
from lit_gpt.model.gpt import GPT


def shard(model: GPT, mesh: DeviceMesh, trained: torch.dtype, frozen: torch.dtype) -> GPT:
    """Shard a model: each rank keeps its share of every block, and gathers a block to run it (Zhao et al. 2023).

    The base is still mapped from its file, in the dtype that it is stored in. One block after another is cast and cut
    up, so that no rank ever holds more than its share and a block.
    """
    for part in (*model.h, model):
        for parameter in part.parameters():
            if not isinstance(parameter, DTensor):  # of a block that is cut up already
                parameter.data = parameter.data.to(trained if parameter.requires_grad else frozen)
        fully_shard(part, mesh=mesh["data_parallel"])
    return model


def build_device(strategy: str, fabric: Fabric) -> torch.device:
    """Return where to build the model: to be sharded on the CPU, mapped from the file, else where it runs."""
    return torch.device("cpu") if strategy in ("fsdp", "deepspeed") else fabric.device
