"""The hyperparameters of each method, as groups of flags. Nothing here imports torch.

A class may name in `free_settings` which of its fields may differ from those of the file that a run starts from.
"""

import json
import math
import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from lit_gpt.cli import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, flag_values
from lit_gpt.errors import UsageError, UserError


@dataclass(frozen=True)
class PartsConfig:
    """Parts of the base that train too"""

    prefix: ClassVar[str] = "train_"

    norms: bool = False  # Train the norms.
    embeddings: Literal["none", "input", "both"] = "none"  # Train the embeddings, or the output head as well.

    @property
    def flags(self) -> list[str]:
        """Return the flags that let something train."""
        given = ["--train_norms true"] if self.norms else []
        return given + ([f"--train_embeddings {self.embeddings}"] if self.embeddings != "none" else [])

    @property
    def unsharded(self) -> str | None:
        """Return the flag for which weights cannot be shared out among ranks, if it is given."""
        return f"--train_embeddings {self.embeddings}" if self.embeddings != "none" else None


def as_parts(config: Any) -> None:
    """Let a method's configuration that comes from a file, with a dictionary of its parts, have them as such."""
    if isinstance(config.parts, dict):
        object.__setattr__(config, "parts", PartsConfig(**config.parts))


SWITCHES = ("query", "key", "value", "projection", "mlp", "head")  # of LoRAConfig, that choose what is adapted

# What cannot be combined: values of LoRAConfig's fields, and why.
CONTRADICTIONS: tuple[tuple[dict[str, tuple[Any, ...]], str], ...] = (
    (
        {"update": ("vera", "tied", "multi", "qa"), "init": ("pissa", "olora", "eva")},
        "each layer would need matrices of its own that all train; expected --lora_init kaiming",
    ),
    (
        {"update": ("glora",), "init": ("pissa", "olora", "eva")},
        "what it begins with would have to be taken from the weight that it scales; expected --lora_init kaiming",
    ),
    ({"update": ("glora",), "train": ("B",)}, "the matrices that scale the weight all train; leave it out"),
    ({"update": ("vera",), "init": ("gaussian",)}, "its frozen matrices are drawn kaiming; leave it out"),
    ({"update": ("vera",), "train": ("B",)}, "its B is frozen as its A is; leave it out"),
    ({"update": ("vera",), "scaling": ("sqrt_r",)}, "its learned vectors are the only scale; leave it out"),
)


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA: update each chosen projection by (lora_alpha / lora_r) B A"""

    prefix: ClassVar[str] = "lora_"
    free_settings: ClassVar[frozenset[str]] = frozenset({"dropout", "lr_ratio"})

    r: PositiveInt = 8  # Set the rank of the updates.
    alpha: PositiveFloat = 16  # Scale the updates by this, divided by lora_r.
    dropout: Fraction = 0.05  # Zero this share of the updates' inputs in training.
    query: bool = True  # Adapt the attention's queries.
    key: bool = False  # Adapt the attention's keys.
    value: bool = True  # Adapt the attention's values.
    projection: bool = False  # Adapt the attention's output projection.
    mlp: bool = False  # Adapt the MLP's linear layers.
    head: bool = False  # Adapt the output head.
    update: Literal["plain", "dora", "vera", "tied", "multi", "qa", "glora"] = "plain"  # Make the updates in this form.
    copies: PositiveInt = 3  # Sum this many updates of each projection, where lora_update is multi.
    init: Literal["kaiming", "gaussian", "pissa", "olora", "eva"] = "kaiming"  # Start A, or A and B, from this.
    scaling: Literal["r", "sqrt_r"] = "r"  # Divide lora_alpha by the rank or by its root (rsLoRA).
    train: Literal["both", "B"] = "both"  # Train A and B, or B alone beside a random A that stays (LoRA-FA).
    lr_ratio: PositiveFloat = 1.0  # Train B at this many times the learning rate (LoRA+: 16).
    ranks: dict[str, Any] = field(default_factory=dict, hash=False)  # Give layers other ranks: '{"mlp": 4}'.
    parts: PartsConfig = PartsConfig()

    def __post_init__(self) -> None:
        as_parts(self)
        if not any(getattr(self, name) for name in SWITCHES):
            raise UsageError("--lora_query and the other projections are all false: nothing would be trained")
        for values, why in CONTRADICTIONS:
            if all(getattr(self, name) in refused for name, refused in values.items()):
                given = " with ".join(f"--lora_{name} {getattr(self, name)}" for name in values)
                raise UsageError(f"{given}: {why}")
        self.check_ranks()
        if self.update == "glora" and self.dropout:
            raise UsageError(
                f"--lora_update glora with --lora_dropout {self.dropout:g}: a weight that is changed has no inputs of "
                "its own; give --lora_dropout 0"
            )
        if self.update == "vera" and self.lr_ratio != 1:
            raise UsageError(f"--lora_update vera with --lora_lr_ratio {self.lr_ratio}: its B does not train")

    def check_ranks(self) -> None:
        """Refuse ranks of single layers that are none, or that have no meaning."""
        if self.ranks and self.update in ("vera", "tied"):
            raise UsageError(
                f"--lora_ranks with --lora_update {self.update}: layers share their matrices; leave it out"
            )
        for pattern, rank in self.ranks.items():
            if type(rank) is not int or rank < 0:
                raise UsageError(f"--lora_ranks: '{pattern}': {rank!r}, expected a whole number, 0 or more")
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"--lora_ranks: '{pattern}': no regular expression ({error})") from None

    def of_layer(self, path: str) -> "LoRAConfig":
        """Return the hyperparameters of the layer at a path: the first pattern found in it decides on its rank."""
        rank = next((rank for pattern, rank in self.ranks.items() if re.search(pattern, path)), self.r)
        return self if rank == self.r else replace(self, r=rank)

    @property
    def scale(self) -> float:
        """Return the factor of B A. VeRA has none: its learned vectors scale the update."""
        if self.update == "vera":
            return 1.0
        return self.alpha / (self.r if self.scaling == "r" else math.sqrt(self.r))

    @property
    def changes_start(self) -> bool:
        """Return whether A and B start from the base's weights, and what they start with is subtracted again."""
        return self.init in ("pissa", "olora")


@dataclass(frozen=True)
class AdapterConfig:
    """Adapter"""

    prefix: ClassVar[str] = "adapter_"

    prompt_length: PositiveInt = 10  # Learn this many vectors that each adapted layer attends to.
    start_layer: NonNegativeInt = 2  # Adapt layers from this one on, counted from 0.


@dataclass(frozen=True)
class IA3Config:
    """IA3"""

    prefix: ClassVar[str] = "ia3_"

    key: bool = True  # Scale the attention's keys.
    value: bool = True  # Scale the attention's values.
    mlp: bool = True  # Scale what the MLP's last layer is given.

    def __post_init__(self) -> None:
        if not any((self.key, self.value, self.mlp)):
            raise UsageError("--ia3_key, --ia3_value and --ia3_mlp are all false: nothing would be trained")


@dataclass(frozen=True)
class PromptConfig:
    """Learned prompts"""

    prefix: ClassVar[str] = "prompt_"
    free_settings: ClassVar[frozenset[str]] = frozenset({"init", "text"})

    kind: Literal["embeddings", "keys_values"] = "embeddings"  # Learn these of each virtual token.
    length: PositiveInt = 20  # Put this many virtual tokens before every sequence.
    encoder: Literal["none", "mlp", "lstm"] = "none"  # Make them by this of vectors that train with it.
    hidden: PositiveInt | None = None  # Give the encoder's inner layers this width (null: the model's).
    init: Literal["vocabulary", "text", "random"] | None = None  # Start from this (null: vocabulary; encoded: random).
    text: str | None = None  # Start from this text, where prompt_init is text.

    def __post_init__(self) -> None:
        if self.kind == "keys_values" and self.encoder == "lstm":
            raise UsageError("--prompt_kind keys_values with --prompt_encoder lstm: expected none or mlp")
        if self.encoder != "none" and self.init not in (None, "random"):
            raise UsageError(
                f"--prompt_encoder {self.encoder} with --prompt_init {self.init}: an encoder starts from random vectors"
            )
        if self.encoder == "none" and self.hidden:
            raise UsageError(f"--prompt_hidden {self.hidden}: is the encoder's; give --prompt_encoder mlp or lstm")
        if bool(self.text) != (self.init == "text"):
            raise UsageError("--prompt_text: goes with --prompt_init text; expected both or none")

    @property
    def virtual_tokens(self) -> int:
        return self.length

    @property
    def start(self) -> str:
        """Return what the vectors start from."""
        return self.init or ("vocabulary" if self.encoder == "none" else "random")


@dataclass(frozen=True)
class BottleneckConfig:
    """Bottleneck adapters"""

    prefix: ClassVar[str] = "bottleneck_"

    size: PositiveInt = 64  # Give the bottleneck this width.
    place: Literal["both", "mlp", "parallel"] = "both"  # Adapt what attention and MLP give, the MLP, or go beside it.
    activation: Literal["relu", "gelu", "silu"] = "relu"  # Use this within.
    norm: bool = False  # Norm what the bottleneck is given (LayerNorm).
    scale: PositiveFloat = 1.0  # Multiply what it adds by this.
    start_layer: NonNegativeInt = 0  # Adapt layers from this one on, counted from 0 (AdapterDrop).
    drop: NonNegativeInt = 0  # Leave out a random number of the first layers, up to this one, in each packed row.

    def __post_init__(self) -> None:
        if 0 < self.drop <= self.start_layer:
            raise UsageError(
                f"--bottleneck_drop {self.drop} with --bottleneck_start_layer {self.start_layer}: the "
                "layers that could be left out have none; give a higher drop, or leave one out"
            )


@dataclass(frozen=True)
class BitFitConfig:
    """BitFit"""

    parts: PartsConfig = PartsConfig()

    def __post_init__(self) -> None:
        as_parts(self)


@dataclass(frozen=True)
class FullConfig:
    """Full finetuning"""

    master_weights: bool = True  # Keep weights in fp32 while they train; in `precision`, small steps are lost.


def from_record(config_class: type, record: dict[str, Any], path: Path) -> Any:
    """Return the hyperparameters in a finetuned file's record; those that a file of before lacks have the defaults.

    Raises:
        UserError: they are not those of the class.
    """
    try:
        return config_class(**record["hyperparameters"])
    except TypeError as error:
        raise UserError(
            f"{path}: not the hyperparameters of a {record['method']} file ({error}); train it again"
        ) from None


def refuse_other_settings(before: Any, config: Any, path: Path) -> None:
    """Refuse to start a run with hyperparameters from a file that has others.

    Args:
        before: those of the file `path`, of the class of `config`.

    Raises:
        UsageError: names all flags that differ.
    """
    free = {getattr(config, "prefix", "") + name for name in getattr(config, "free_settings", ())}
    now = flag_values(config)
    others = {flag: value for flag, value in flag_values(before).items() if flag not in free and now[flag] != value}
    if others:
        raise UsageError(f"{typed({flag: now[flag] for flag in others})}: {path} has {typed(others)}; give that")


def typed(flags: dict[str, Any]) -> str:
    """Return flags as they are typed on a command line."""
    values = {name: value if isinstance(value, str) else json.dumps(value) for name, value in flags.items()}
    return " ".join(f"--{name} {shlex.quote(value)}" for name, value in values.items())
