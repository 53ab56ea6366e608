"""Defines the flags by which a run spreads over devices. Nothing here imports torch."""

from dataclasses import dataclass
from typing import Literal

from lit_gpt.cli import Device, PositiveInt


@dataclass(frozen=True)
class DeviceArgs:
    """Devices"""

    device: Device = "auto"
    devices: PositiveInt | Literal["auto"] = 1  # Use this many devices on each node (auto: all GPUs, or the CPU).
    num_nodes: PositiveInt = 1  # Use this many machines.
    strategy: Literal["auto", "ddp", "fsdp", "deepspeed"] = "auto"  # Choose how devices share the work.
    zero_stage: Literal[2, 3] = 2  # Shard gradients and optimizer state with deepspeed (2), and weights too (3).
    zero_offload: bool = False  # Keep in host memory what deepspeed shards.

    @property
    def ranks(self) -> int:
        """Return how many processes the run has, over all nodes. `auto` must have been resolved."""
        return int(self.devices) * self.num_nodes
