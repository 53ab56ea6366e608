"""The hyperparameters of each method, as groups of flags. Nothing here imports torch."""

from dataclasses import dataclass
from typing import ClassVar

from lit_gpt.cli import Fraction, NonNegativeInt, PositiveFloat, PositiveInt
from lit_gpt.errors import UsageError


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA: update each chosen projection by (lora_alpha / lora_r) B A"""

    prefix: ClassVar[str] = "lora_"

    r: PositiveInt = 8  # Set the rank of the updates.
    alpha: PositiveFloat = 16  # Scale the updates by this, divided by lora_r.
    dropout: Fraction = 0.05  # Zero this share of the updates' inputs in training.
    query: bool = True  # Adapt the attention's queries.
    key: bool = False  # Adapt the attention's keys.
    value: bool = True  # Adapt the attention's values.
    projection: bool = False  # Adapt the attention's output projection.
    mlp: bool = False  # Adapt the MLP's linear layers.
    head: bool = False  # Adapt the output head.

    def __post_init__(self) -> None:
        if not any((self.query, self.key, self.value, self.projection, self.mlp, self.head)):
            raise UsageError("--lora_query and the other projections are all false: nothing would be trained")


@dataclass(frozen=True)
class AdapterConfig:
    """Adapter"""

    prefix: ClassVar[str] = "adapter_"

    prompt_length: PositiveInt = 10  # Learn this many vectors that each adapted layer attends to.
    start_layer: NonNegativeInt = 2  # Adapt layers from this one on, counted from 0.


@dataclass(frozen=True)
class FullConfig:
    """Full finetuning"""

    master_weights: bool = True  # Keep weights in fp32 while they train; in `precision`, small steps are lost.
