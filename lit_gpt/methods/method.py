"""What the finetuning methods have in common."""

import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from lit_gpt.hardware import DTYPES
from lit_gpt.model.gpt import GPT

METHODS = ("lora", "adapter", "adapter_v2")


@dataclass(frozen=True)
class Method:
    """How a finetune script trains: what it does to the base, and what of it is kept."""

    name: str
    attach: Callable[[GPT], GPT]  # from the base to the model to train, in place
    settings: dict[str, Any] = field(default_factory=dict)  # hyperparameters, from which it can be attached again
    whole_model: bool = False  # the base's own weights train, and the result is a checkpoint folder
    quantize: str | None = None  # how the base is quantized

    def weight_dtype(self, hp: SimpleNamespace) -> torch.dtype:
        """The dtype in which the base's weights are kept: what trains in float32, unless asked for otherwise."""
        return torch.float32 if self.whole_model and hp.master_weights else DTYPES[hp.precision]

    def autocast(self, hp: SimpleNamespace, device: str) -> torch.autocast:
        """The context of a forward pass: arithmetic in the run's precision, if the weights are of another.

        Without a cache of weights that were cast: each is used once, and together they would take half the weights'
        room again.
        """
        dtype = DTYPES[hp.precision]
        return torch.autocast(device, dtype, enabled=self.weight_dtype(hp) != dtype, cache_enabled=False)

    @classmethod
    def of(cls, module: ModuleType, config: Any) -> "Method":
        return cls(module.METHOD, partial(module.attach, config=config), asdict(config))


def train_only_what_is_attached(model: nn.Module) -> None:
    model.requires_grad_(False)
    for module in model.modules():
        for name in getattr(module, "trained_parameters", ()):
            module.get_parameter(name).requires_grad_(True)


def method_module(method: str) -> ModuleType:
    return importlib.import_module(f"lit_gpt.methods.{method}")
