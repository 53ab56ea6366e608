"""Gathers whole tensors from their shards, and cuts whole ones into shards.

What only generates imports this too: neither torch's FSDP nor Lightning, which take seconds, is imported here.
"""

from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

from lit_gpt.distributed import deepspeed

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def gather(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that is sharded over ranks, else the tensor. All ranks must ask together."""
    if deepspeed.is_partitioned(tensor):
        return deepspeed.get_full(tensor)
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(parameter: Tensor, contents: Tensor) -> Tensor:
    """Return this rank's shard of a whole tensor, if the parameter is sharded over ranks; else the tensor."""
    if not is_sharded(parameter):
        return contents
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(contents.to(parameter.device), parameter.device_mesh, parameter.placements)


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Return whether a tensor is a DTensor, a shard of which each rank holds."""
    return hasattr(tensor, "full_tensor")
