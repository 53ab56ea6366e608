"""The finetuning methods by name. Nothing here imports torch until a method is loaded."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_gpt.errors import UsageError, UserError
from lit_gpt.methods.hyperparameters import (
    AdapterConfig,
    BitFitConfig,
    BottleneckConfig,
    FullConfig,
    IA3Config,
    LoRAConfig,
    PromptConfig,
    from_record,
)

if TYPE_CHECKING:
    from lit_gpt.methods.method import Method


@dataclass(frozen=True)
class Entry:
    """A registered method.

    Attributes:
        config_class: the dataclass of its hyperparameters.
        load: imports its class.
        attaches: whether its finetuned file is attached to a base, not a model of its own.
    """

    config_class: type
    load: Callable[[], "type[Method]"]
    attaches: bool = True


METHODS: dict[str, Entry] = {}


def register(name: str, config_class: type, load: "Callable[[], type[Method]]", attaches: bool = True) -> None:
    """Make a method known by its name to scripts, finetuned files and the memory plan."""
    METHODS[name] = Entry(config_class, load, attaches)


def config_class(name: str) -> type:
    """Return the dataclass of a method's hyperparameters. Raises UsageError if the method is not known."""
    return entry(name).config_class


def make_method(name: str, config: Any) -> "Method":
    """Return the method with these hyperparameters. Raises UsageError if it is not known."""
    return entry(name).load()(config)


def recorded_config(record: dict[str, Any], path: Path) -> Any:
    """Return the hyperparameters that a finetuned file records.

    Raises:
        UserError: its method is not known or not one that attaches to a base, or has others.
    """
    name = record["method"]
    if name not in METHODS or not METHODS[name].attaches:
        known = " or ".join(known for known, method in METHODS.items() if method.attaches)
        raise UserError(f"{path}: trained by the method {name}, expected {known}")
    return from_record(config_class(name), record, path)


def flag_prefixes() -> tuple[str, ...]:
    """Return what stands before the names of the flags of methods."""
    prefixes = {getattr(method.config_class, "prefix", "") for method in METHODS.values()}
    return tuple(sorted(prefixes - {""}))


def entry(name: str) -> Entry:
    """Return what is registered under a name. Raises UsageError if nothing is."""
    if name not in METHODS:
        raise UsageError(f"--method {name}: there is no such method; expected one of {', '.join(METHODS)}")
    return METHODS[name]


def _lora() -> "type[Method]":
    from lit_gpt.methods.lora import LoRA

    return LoRA


def _adapter() -> "type[Method]":
    from lit_gpt.methods.adapter import Adapter

    return Adapter


def _adapter_v2() -> "type[Method]":
    from lit_gpt.methods.adapter_v2 import AdapterV2

    return AdapterV2


def _ia3() -> "type[Method]":
    from lit_gpt.methods.ia3 import IA3

    return IA3


def _prompt() -> "type[Method]":
    from lit_gpt.methods.prompt import Prompt

    return Prompt


def _bottleneck() -> "type[Method]":
    from lit_gpt.methods.bottleneck import Bottlenecks

    return Bottlenecks


def _bitfit() -> "type[Method]":
    from lit_gpt.methods.parts import BitFit

    return BitFit


def _full() -> "type[Method]":
    from lit_gpt.methods.full import Full

    return Full


register("lora", LoRAConfig, _lora)
register("adapter", AdapterConfig, _adapter)
register("adapter_v2", AdapterConfig, _adapter_v2)
register("ia3", IA3Config, _ia3)
register("prompt", PromptConfig, _prompt)
register("bottleneck", BottleneckConfig, _bottleneck)
register("bitfit", BitFitConfig, _bitfit)
register("full", FullConfig, _full, attaches=False)
