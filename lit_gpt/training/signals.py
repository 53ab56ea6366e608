"""Holds SIGINT and SIGTERM until the step in hand is done."""

import signal
import sys
from typing import Any

import torch

from lit_gpt.distributed.fabric import Fabric
from lit_gpt.distributed.launch import all_reduce


class StopSignals:
    """Holds the signals within a block, and tells whether one came. A second SIGINT interrupts at once."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric, self.received = fabric, False

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def receive(self, number: int, frame: Any) -> None:
        """Note a signal and say what will follow."""
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        print(f"\n{signal.Signals(number).name}: saving after this step", file=sys.stderr)

    def asked(self) -> bool:
        """Return whether any rank was told to stop. All ranks must ask together."""
        if self.fabric.world_size == 1:
            return self.received
        return bool(all_reduce(self.fabric, torch.tensor(float(self.received), device=self.fabric.device)))

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
