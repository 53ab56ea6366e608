"""Places a model's layers on several devices, which compute one after another (a pipeline of one sequence).

One process drives all of them, so that whatever generates does so as from one device: embedding, head and sampling are
on the first, each layer and its cache where it is placed, and only hidden states go from one device to the next.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from lit_gpt.errors import UsageError
from lit_gpt.hardware import choose_device
from lit_gpt.model.config import Config
from lit_gpt.model.gpt import GPT, Block, BlockExecution
from lit_gpt.model.packed_inputs import Segments
from lit_gpt.model.rope import Rotation


@dataclass(frozen=True)
class Placement:
    """Says on which device each part of a model lies."""

    devices: tuple[torch.device, ...]

    @property
    def type(self) -> str:
        """Return the type that all devices have."""
        return self.devices[0].type

    def layers(self, config: Config) -> list[torch.device]:
        """Return the device of each layer: the first layers on the first device, as many on each as on the others.

        Raises:
            UsageError: there are more devices than layers, or layers read what others keep.
        """
        n, given = config.n_layer, f"--devices {len(self.devices)}"
        if len(self.devices) > n:
            raise UsageError(f"{given}: {config.name} has {n} layers; expected at most one device for each")
        if config.kv_layers:
            raise UsageError(f"{given}: layers of {config.name} share keys and values; expected --devices 1")
        return [self.devices[layer * len(self.devices) // n] for layer in range(n)]

    def device_of(self, name: str, config: Config) -> torch.device:
        """Return the device of a tensor by its name in the model."""
        parts = name.split(".")
        return self.layers(config)[int(parts[1])] if parts[0] == "h" else self.devices[0]

    def apply(self, model: GPT) -> None:
        """Have each block run on its device, once its tensors lie there."""
        last = len(model.h) - 1
        known: dict[torch.device, dict[int, Any]] = {device: {} for device in self.devices}
        before = self.devices[0]
        for i, device in enumerate(self.layers(model.config)):
            if device != self.devices[0]:
                home = self.devices[0] if i == last else None
                model.h[i].execution = PlacedExecution(device, device != before, home, known[device])  # type: ignore
            before = device


Where = torch.device | str | Placement


class PlacedExecution(BlockExecution):
    """Runs a block on its device, where its inputs are brought.

    Args:
        first: whether the block is the first on the device in each pass.
        home: where its output goes; None: it stays.
        known: what was brought to the device in this pass and what it has become, by the identity of the former: layers
            have rotations and boundaries in common.
    """

    def __init__(self, device: torch.device, first: bool, home: torch.device | None, known: dict[int, Any]) -> None:
        self.device, self.first, self.home, self.known = device, first, home, known

    def run(self, block: Block, *inputs: Any) -> Tensor:
        if self.first:
            self.known.clear()
        with current(self.device):
            y = super().run(block, *map(self.brought, inputs))
        return y if self.home is None else y.to(self.home)

    def brought(self, given: Any) -> Any:
        """Return an input of the block on the device."""
        if isinstance(given, Tensor):
            return given.to(self.device)
        if not isinstance(given, Rotation | Segments):
            return given  # a cache, which lies where its layer does
        if id(given) not in self.known:
            self.known[id(given)] = given, moved(given, self.device)
        return self.known[id(given)][1]


def moved(given: Rotation | Segments, device: torch.device) -> Rotation | Segments:
    """Return a rotation, or boundaries of samples, on a device."""
    if isinstance(given, Rotation):
        return Rotation(*(x if x is None else x.to(device) for x in given))
    return replace(given, **{name: getattr(given, name).to(device) for name in ("offsets", "positions", "samples")})


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which kernels that are launched by name go to the device, such as Triton's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def place(kind: str, devices: int) -> torch.device | Placement:
    """Return where `--device` and `--devices` put a model.

    Raises:
        UsageError: there are no such devices, or fewer.
    """
    device = choose_device(kind)
    if devices == 1:
        return device
    found = count(device)
    if devices > found:
        raise UsageError(f"--devices {devices}: torch finds {found} of type {device.type} here; give at most as many")
    return Placement(tuple(torch.device(device.type, i) for i in range(devices)))


def count(device: torch.device) -> int:
    """Return how many devices of this type there are; the CPU is one."""
    return torch.cuda.device_count() if device.type == "cuda" else 1


def devices_of(model: GPT) -> list[torch.device]:
    """Return the devices that a model lies on, the first one first."""
    blocks = (next(block.parameters()).device for block in cast(Iterable[Block], model.h))
    return list(dict.fromkeys((model.wte.weight.device, *blocks)))
