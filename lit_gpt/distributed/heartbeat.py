"""Ends a rank, with one line, when another rank of the run is lost."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from lit_gpt.distributed.fabric import Fabric
from lit_gpt.errors import UserError


@contextmanager
def peer_watchdog(fabric: Fabric) -> Iterator[None]:
    """End this rank, with one line, if another is lost while the block runs: what they do together would never end.

    Raises:
        UserError: the connection to another rank broke.
    """
    if fabric.world_size == 1:
        yield
        return
    watch = Heartbeat(fabric)
    watch.start()
    try:
        yield
        fabric.barrier()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise UserError(
            f"rank {fabric.global_rank}: lost touch with another process of the run{Heartbeat.ADVICE}"
        ) from None
    finally:
        watch.finished.set()
        watch.join(Heartbeat.PATIENCE)  # Python aborts if it ends while a thread is in the store
    if dist.is_initialized() and dist.get_backend() == "gloo":  # or Python may abort; NCCL's Lightning ends itself
        dist.destroy_process_group()


class Heartbeat(threading.Thread):
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
