"""The protocol of a finetuning method: how it changes a base model, what of it trains and is kept.

A method attaches to a base GPT in place, from outside: by wrapping linear layers and norms, or as an attention's
prefix. Each module that it adds names its own parameters that train in `trained_parameters`, and may say how the fast
decoding step computes it (`record`, see lit_gpt.methods.decoding_tape).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lit_gpt.errors import UserError
from lit_gpt.hardware import DTYPES
from lit_gpt.kernels.linear import arithmetic
from lit_gpt.methods import finetuned_file
from lit_gpt.methods.hyperparameters import from_record, refuse_other_settings
from lit_gpt.model.config import Config
from lit_gpt.model.gpt import GPT
from lit_gpt.model.linear import Linear
from lit_gpt.model.moe import Experts
from lit_gpt.quantization.modules import QuantizedLinear


@dataclass(frozen=True)
class Start:
    """Holds what a run has as it begins, for methods that start from more than the base.

    Attributes:
        encode: gives the token ids of a text, without BOS.
        row: gives the packed row of these samples, with its `idx` and `segments`, on the run's device.
        samples: how many there are to train on.
    """

    encode: Callable[[str], list[int]]
    row: Callable[[Sequence[int]], Any]
    samples: int


class Method(ABC):
    """A finetuning method with its hyperparameters.

    Attributes:
        name: by which files, flags and scripts know the method.
        trains_base: whether the base's own weights train, so that the result is a whole checkpoint folder.
        merges: whether what was trained can be folded into the base's weights.
        config: the hyperparameters, a frozen dataclass of lit_gpt.methods.hyperparameters.
    """

    name: ClassVar[str]
    trains_base: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def settings(self) -> dict[str, Any]:
        """Return the hyperparameters that a finetuned file records and that a resumed run must share."""
        return asdict(self.config)

    @property
    def first_trained_layer(self) -> int:
        """Return the first block with parameters that train; no gradient goes further down."""
        return 0

    @property
    def first_uniform_layer(self) -> int:
        """Return the block from which on all are extended alike: two of them tell the memory plan about the rest."""
        return 0

    @property
    def virtual_tokens(self) -> int:
        """Return how many tokens of learned vectors stand before every sequence."""
        return 0

    def virtual_ids(self, config: Config) -> tuple[int, ...]:
        """Return the ids of these tokens, which follow those of the vocabulary."""
        return tuple(range(config.padded_vocab_size, config.padded_vocab_size + self.virtual_tokens))

    @abstractmethod
    def attach(self, model: GPT) -> GPT:
        """Extend a base in place, and let only what is attached train."""

    def initialize(self, model: GPT, start: Start | None = None) -> None:  # noqa: B027 (nothing to do for most)
        """Fill what starts from the base's weights or from the data, once attached and before anything trains.

        It may take long, so it is for a run that begins: loading, resuming and planning do without.
        """

    def learning_rate_ratio(self, name: str) -> float:
        """Return by what the learning rate is multiplied for the parameter `name`."""
        return 1.0

    @property
    def unsharded(self) -> str | None:
        """Return the flag and value for which the weights cannot be shared out among ranks, if there is one."""
        return None

    def weight_dtype(self, precision: str) -> torch.dtype:
        """Return the dtype in which the base's weights are kept, for a run's `--precision`."""
        return DTYPES[precision]

    def autocast(self, precision: str, device_type: str) -> torch.autocast:
        """Return the context of a forward pass: arithmetic in `precision` if the weights have another dtype.

        A CPU without arithmetic in `precision` computes in the weights' dtype.

        The context keeps no cache of cast weights: each is used once, and together they would take half the weights'
        memory again.
        """
        dtype = DTYPES[precision]
        enabled = self.weight_dtype(precision) != dtype == arithmetic(torch.device(device_type), dtype)
        return torch.autocast(device_type, dtype, enabled=enabled, cache_enabled=False)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what trains, each tensor whole. All ranks must ask together."""
        return finetuned_file.trained_state(model)

    def load_state(self, model: nn.Module, state: Mapping[str, Tensor], source: Path | str) -> None:
        """Copy tensors into the parameters that train. Raises UserError if names or shapes differ."""
        finetuned_file.load_trained(model, state, source)

    def warm_start(self, model: nn.Module, path: Path, base: str, quantization: str | None = None) -> None:
        """Start from what an earlier run has trained.

        Args:
            path: a finetuned file of this method.
            base: fingerprint of the base that `model` extends.
            quantization: how that is quantized, as `BaseCheckpoint.quantization` says.

        Raises:
            UserError: the file is of another method or base, or of one whose codes are others than the nearest.
            UsageError: the flags say otherwise than its settings.
        """
        record = finetuned_file.read_file(path, self.name, base)
        name, _, codes = (record.get("quantize") or "").partition(":")
        if codes and record["quantize"] != quantization:
            raise UserError(
                f"{path}: goes with the {name} weights of fingerprint {codes}, not with those of --checkpoint_dir; "
                "give the folder that scripts/quantize.py wrote"
            )
        refuse_other_settings(from_record(type(self.config), record, path), self.config, path)
        self.load_state(model, record["state"], path)

    def merge(self, model: GPT) -> GPT:
        """Fold what was trained into the base's weights, in place.

        Raises:
            UserError: the method has no such form.
        """
        raise UserError(f"what {self.name} trains cannot be folded into the base's weights; use it beside its base")

    def hold_merge(self, model: GPT) -> None:  # noqa: B027 (nothing to hold unless a method merges)
        """Hold, one after another, the tensors that merging holds. The memory plan counts them."""


class LinearWrapper(nn.Module):
    """Takes the place of a linear layer, of a layer of experts, or of another wrapper, and changes its output.

    Attributes:
        experts: (n_expert,) for a layer of experts, the first dimension of what its wrapper adds; else ().
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear, self.experts = linear, experts_of(linear)
        sizes = cast(Experts, linear)  # for mypy, to which all attributes of modules are tensors or modules
        self.in_features, self.out_features = sizes.in_features, sizes.out_features


def experts_of(layer: nn.Module) -> tuple[int, ...]:
    """Return (n_expert,) for a layer of experts, wrapped or not, and () for any other layer."""
    return (layer.n_expert,) if isinstance(layer, Experts) else getattr(layer, "experts", ())


def with_weight(linear: nn.Module, weight: Tensor, dtype: torch.dtype) -> nn.Module:
    """Return a layer with another weight; a quantized layer becomes a plain one, with its weight in `dtype`."""
    if isinstance(linear, QuantizedLinear):
        weight, bias = weight.to(dtype), linear.bias
        linear = Linear(linear.in_features, linear.out_features, bias=False, device="meta")
        linear.bias = bias
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def mark_trainable(model: nn.Module) -> None:
    """Let only the parameters train that attached modules name in `trained_parameters`."""
    model.requires_grad_(False)
    for module in model.modules():
        for name in getattr(module, "trained_parameters", ()):
            module.get_parameter(name).requires_grad_(True)
