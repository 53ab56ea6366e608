"""How a run spreads over devices, through Lightning Fabric: one, DDP, FSDP2, or DeepSpeed's ZeRO.

The rest of the project sees whole tensors: what is shared out among ranks is gathered and shared out again here and in
zero.py, so that a resume state does not depend on the strategy nor on the number of ranks.
"""

import os
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_gpt.distributed import deepspeed
from lit_gpt.distributed.sharding import shard
from lit_gpt.errors import UsageError, UserError
from lit_gpt.hardware import default_device


def launch(hp: SimpleNamespace, trained: torch.dtype, frozen: torch.dtype) -> Fabric:
    """Fabric for `--devices`, `--num_nodes` and `--strategy`, its processes started.

    Args:
        trained, frozen: the dtypes of weights that train and that do not, to which FSDP brings each rank's share.

    Raises:
        UsageError: a strategy or a number of devices that this machine cannot give, or that torchrun, `fabric run` or
            srun, if it has started this process, was not asked for.
    """
    launched = by_fabric_run(hp)
    check_launcher(hp)
    kind, strategy = default_device().type, hp.strategy
    if strategy == "fsdp":
        sizes = {"data_parallel_size": hp.devices * hp.num_nodes, "tensor_parallel_size": 1}
        strategy = ModelParallelStrategy(partial(shard, trained=trained, frozen=frozen), **sizes)
    elif strategy == "deepspeed":
        if kind != "cuda":
            raise UsageError("--strategy deepspeed: DeepSpeed needs CUDA devices and this machine has none; try fsdp")
        strategy = DeepSpeedStrategy(config=deepspeed.config(hp.zero_stage, hp.zero_offload))
    try:
        fabric = Fabric(accelerator=kind, devices=hp.devices, num_nodes=hp.num_nodes, strategy=strategy)
    except (MisconfigurationException, ValueError) as error:
        raise UsageError(f"--devices {hp.devices} --strategy {hp.strategy}: {error}") from None
    if not launched:
        fabric.launch()
    return fabric


def by_fabric_run(hp: SimpleNamespace) -> bool:
    """Whether `fabric run` has started this process. What it was told then stands for the script's flags, which it
    would compare with what Fabric is given, and cannot with a strategy that is no name."""
    if os.environ.get("LT_CLI_USED") != "1":
        return False
    if "LT_PRECISION" in os.environ:
        raise UsageError("--precision: `fabric run` took it for its own flag; write -- before the script's flags")
    for name, default in {"devices": 1, "num_nodes": 1, "strategy": "auto"}.items():
        told, own = os.environ.pop(f"LT_{name.upper()}", str(default)), getattr(hp, name)
        if told not in (str(own), "auto"):
            known = told in ("ddp", "fsdp", "deepspeed") if name == "strategy" else told.isdecimal()
            if own != default or not known:
                raise UsageError(f"--{name} {own}: `fabric run` was told --{name} {told}; give both the same")
            setattr(hp, name, type(own)(told))
    return True


def check_launcher(hp: SimpleNamespace) -> None:
    """Refuse to start if a launcher has started another number of processes: they would wait for one another without
    end, or each train alone and write over the others' files."""
    for name, environment in {"torchrun": TorchElasticEnvironment, "SLURM": SLURMEnvironment}.items():
        if environment.detect():
            try:
                size = environment().world_size()
            except RuntimeError as error:
                raise UsageError(f"{name}: {error}") from None
            if size != hp.devices * hp.num_nodes:
                wanted = f"--devices {hp.devices} --num_nodes {hp.num_nodes}"
                raise UsageError(f"{wanted}: {name} has started {size} processes; give it and the script the same")
            return


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
