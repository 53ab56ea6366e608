"""Spreads a run over devices, through Lightning Fabric: one, DDP, FSDP2, or DeepSpeed's ZeRO.

The rest of the project sees whole tensors: what is shared out among ranks is gathered and sharded again by sharding.py
and deepspeed.py, so that a resume state does not depend on the strategy nor on the number of ranks.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from lit_gpt.distributed.args import DeviceArgs
from lit_gpt.distributed.deepspeed_strategy import ZeroStrategy
from lit_gpt.distributed.fabric import (
    Fabric,
    MisconfigurationException,
    ModelParallelStrategy,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lit_gpt.distributed.sharding import shard
from lit_gpt.errors import UsageError, UserError
from lit_gpt.hardware import choose_device


def launch(args: DeviceArgs, trained: torch.dtype, frozen: torch.dtype, max_grad_norm: float | None = None) -> Fabric:
    """Return Fabric for `--devices`, `--num_nodes` and `--strategy`, its processes started.

    Args:
        trained, frozen: the dtypes of weights that train and that do not, to which FSDP brings each rank's share.
        max_grad_norm: the norm to which DeepSpeed is to clip the gradient, as it does so itself.

    Raises:
        UsageError: a strategy or a number of devices that this machine cannot give, or that torchrun, `fabric run` or
            srun, if it has started this process, was not asked for.
    """
    check_launcher(args)
    kind = choose_device(args.device).type
    strategy: str | ModelParallelStrategy | ZeroStrategy = args.strategy
    if strategy == "fsdp":
        sharding = partial(shard, trained=trained, frozen=frozen)
        strategy = ModelParallelStrategy(sharding, data_parallel_size=args.ranks, tensor_parallel_size=1)
    elif strategy == "deepspeed":
        if kind == "mps":
            raise UsageError("--strategy deepspeed: it needs CUDA devices, or --device cpu")
        strategy = ZeroStrategy(kind, args.zero_stage, args.zero_offload, max_grad_norm)
    try:
        fabric = Fabric(accelerator=kind, devices=args.devices, num_nodes=args.num_nodes, strategy=strategy)
    except (MisconfigurationException, ValueError) as error:
        raise UsageError(f"--devices {args.devices} --strategy {args.strategy}: {error}") from None
    if not started_by_fabric_run():
        fabric.launch()
    return fabric


def started_by_fabric_run() -> bool:
    """Return whether `fabric run` has started this process."""
    return os.environ.get("LT_CLI_USED") == "1"


def resolve_devices(args: DeviceArgs) -> DeviceArgs:
    """Return the arguments with the number of this machine's devices for `--devices auto`: one if these are no GPUs."""
    if args.devices != "auto":
        return args
    on_cuda = choose_device(args.device).type == "cuda"
    return replace(args, devices=torch.cuda.device_count() if on_cuda else 1)


def told_by_fabric_run(args: DeviceArgs) -> DeviceArgs:
    """Return the arguments with what `fabric run` was told, if it has started this process.

    Its own variables are taken away: Fabric would compare them with what it is given, and cannot with a strategy that
    is no name.

    Raises:
        UsageError: the script's flags say otherwise.
    """
    if not started_by_fabric_run():
        return args
    if "LT_PRECISION" in os.environ:
        raise UsageError("--precision: `fabric run` took it for its own flag; write -- before the script's flags")
    changes: dict[str, Any] = {}
    defaults: dict[str, Any] = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    for name, default in defaults.items():
        told, own = os.environ.pop(f"LT_{name.upper()}", str(default)), getattr(args, name)
        if told not in (str(own), "auto"):
            known = told in ("ddp", "fsdp", "deepspeed") if name == "strategy" else told.isdecimal()
            if own not in (default, "auto") or not known:
                raise UsageError(f"--{name} {own}: `fabric run` was told --{name} {told}; give both the same")
            changes[name] = type(default)(told)
    return replace(args, **changes)


def check_launcher(args: DeviceArgs) -> None:
    """Refuse to start if a launcher has started another number of processes.

    They would wait for one another without end, or each train alone and write over the others' files.
    """
    torchrun = TorchElasticEnvironment.detect()
    if not torchrun and not SLURMEnvironment.detect():
        return
    name = "torchrun" if torchrun else "SLURM"
    try:
        size = (TorchElasticEnvironment() if torchrun else SLURMEnvironment()).world_size()
    except RuntimeError as error:
        raise UsageError(f"{name}: {error}") from None
    if size != args.ranks:
        wanted = f"--devices {args.devices} --num_nodes {args.num_nodes}"
        raise UsageError(f"{wanted}: {name} has started {size} processes; give it and the script the same")


def on_main(fabric: Fabric, action: Callable[[], None]) -> None:
    """Let rank 0 do what only one may do, such as writing a file. If it fails there, every rank ends."""
    error = None
    if fabric.global_rank == 0:
        try:
            action()
        except (OSError, UserError) as problem:
            error = problem
    if fabric.broadcast(error is not None):
        raise error or SystemExit(1)  # rank 0 says why


def all_reduce(fabric: Fabric, tensor: Tensor, op: str = "sum") -> Tensor:
    """Return the sum of a tensor over all ranks, or their maximum ("max"). All ranks must ask together."""
    return cast(Tensor, fabric.all_reduce(tensor, reduce_op=op))  # whose type is that of any collection
