"""How a run spreads over devices, through Lightning Fabric: one, DDP, FSDP2, or DeepSpeed's ZeRO.

The rest of the project sees whole tensors: what is shared out among ranks is gathered and shared out again here and in
zero.py, so that a resume state does not depend on the strategy nor on the number of ranks.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from lit_gpt import optimizers, zero
from lit_gpt.errors import UsageError, UserError
from lit_gpt.generation import default_device
from lit_gpt.model import GPT
from lit_gpt.optimizers import InBackward, make_optimizer, optimizer_of
from lit_gpt.variants import shared_like, whole


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
        strategy = DeepSpeedStrategy(config=zero.config(hp.zero_stage, hp.zero_offload))
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


def shard(model: GPT, mesh: DeviceMesh, trained: torch.dtype, frozen: torch.dtype) -> GPT:
    """FSDP2: each rank keeps its share of every block and gathers a block when it runs (Zhao et al. 2023).

    The base is still mapped from its file, in the dtype that it is stored in. One block after another is cast and cut
    up, so that no rank ever holds more than its share and a block.
    """
    for part in (*model.h, model):
        for parameter in part.parameters():
            if not isinstance(parameter, DTensor):  # of a block that is cut up already
                parameter.data = parameter.data.to(trained if parameter.requires_grad else frozen)
        fully_shard(part, mesh=mesh["data_parallel"])
    return model


def place_to_build(hp: SimpleNamespace, fabric: Fabric) -> torch.device:
    """Where to build the model: to be shared out on the CPU, mapped from the file, else where it runs."""
    return torch.device("cpu") if hp.strategy in ("fsdp", "deepspeed") else fabric.device


def setup(fabric: Fabric, model: nn.Module, hp: SimpleNamespace) -> tuple[nn.Module, Any]:
    """The model behind the strategy, and the optimizer of its parameters that train."""
    if isinstance(fabric.strategy, DeepSpeedStrategy):  # wants both together
        return fabric.setup(model, make_optimizer(trained(model), hp))
    wrapped = fabric.setup_module(model)
    optimizer = optimizer_of(trained(model), hp)
    return wrapped, optimizer if isinstance(optimizer, InBackward) else fabric.setup_optimizers(optimizer)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def accumulating(fabric: Fabric, wrapped: nn.Module, more: bool) -> Any:
    """The context of a backward pass. `more`: others follow before the optimizer steps, so ranks need not meet yet."""
    if isinstance(fabric.strategy, DeepSpeedStrategy):
        fabric.strategy.model.set_gradient_accumulation_boundary(not more)
        return nullcontext()
    return fabric.no_backward_sync(wrapped, enabled=more)


def optimizer_state(fabric: Fabric, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state, whole, so that it does not depend on the number of ranks. All ranks must ask together."""
    if isinstance(fabric.strategy, DeepSpeedStrategy):
        return zero.optimizer_state(trained(model), optimizer)
    return tree_map(lambda leaf: whole(leaf) if isinstance(leaf, Tensor) else leaf, optimizer.state_dict())


def load_optimizer_state(
    fabric: Fabric, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    if isinstance(fabric.strategy, DeepSpeedStrategy):
        return zero.load_optimizer_state(trained(model), optimizer, state)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for i, entries in state["state"].items():
        for name, entry in entries.items():
            if isinstance(entry, Tensor) and entry.shape == parameters[i].shape:
                entries[name] = shared_like(parameters[i], entry)
    return optimizer.load_state_dict(state)


def allocate(fabric: Fabric, optimizer: Any) -> None:
    """Let the optimizer make its state, by a step that changes no weight."""
    if not isinstance(fabric.strategy, DeepSpeedStrategy):  # which has made it already
        optimizers.allocate(optimizer)


def forget(fabric: Fabric, optimizer: Any) -> None:
    """Take the optimizer's state back to its beginning."""
    (zero if isinstance(fabric.strategy, DeepSpeedStrategy) else optimizers).forget(optimizer)


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


@contextmanager
def company(fabric: Fabric) -> Iterator[None]:
    """End this rank, with one line, if another is lost while the block runs: what they do together would never end.

    Raises:
        UserError: the connection to another rank broke.
    """
    if fabric.world_size == 1:
        yield
        return
    watch = Watch(fabric)
    watch.start()
    try:
        yield
        fabric.barrier()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise UserError(
            f"rank {fabric.global_rank}: lost touch with another process of the run{Watch.ADVICE}"
        ) from None
    finally:
        watch.finished.set()
        watch.join(Watch.PATIENCE)  # Python aborts if it ends while a thread is in the store
    if dist.is_initialized() and dist.get_backend() == "gloo":  # or Python may abort; NCCL's Lightning ends itself
        dist.destroy_process_group()


class Watch(threading.Thread):
    """Beats for this rank in the run's store, and listens for the others' beats.

    A rank that was killed on another machine, or hangs, would otherwise be waited for until NCCL's time-out, if any.
    """

    INTERVAL, PATIENCE = 2.0, 25.0  # seconds
    ADVICE = "; has it been killed? The same command with --resume auto goes on from the last state saved"

    def __init__(self, fabric: Fabric) -> None:
        super().__init__(daemon=True, name="watch")
        self.rank, self.size, self.finished = fabric.global_rank, fabric.world_size, threading.Event()
        self.started = getattr(fabric.strategy.launcher, "procs", [])  # by this process, if nobody else starts them

    def run(self) -> None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        heard: dict[int, tuple[bytes, float]] = {}
        try:
            store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=self.PATIENCE))
            while not self.finished.wait(self.INTERVAL):
                store.set(f"lit_gpt/{self.rank}", str(time.monotonic()))
                # rank 0 listens to all, the others to rank 0: a store asked by all for all would be busy with it
                for other in range(1, self.size) if self.rank == 0 else (0,):
                    self.listen(store, other, heard)
        except dist.DistError:
            self.end("lost touch with rank 0")

    def listen(self, store: dist.Store, other: int, heard: dict[int, tuple[bytes, float]]) -> None:
        key, now = f"lit_gpt/{other}", time.monotonic()
        beat = store.get(key) if store.check([key]) else b""
        if other not in heard or heard[other][0] != beat:
            heard[other] = beat, now
        elif now - heard[other][1] > self.PATIENCE:
            self.end(f"rank {other} has not been heard of for {self.PATIENCE:.0f} s")

    def end(self, what: str) -> None:
        # this rank's main thread may be about to end as well: the others are done and gone, or it says itself what is
        if not self.finished.wait(self.INTERVAL):
            print(f"error: rank {self.rank}: {what}{self.ADVICE}", flush=True, file=sys.stderr)
            for process in self.started:
                process.kill()
            os._exit(1)  # the main thread may hang in a collective operation
