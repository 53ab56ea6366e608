"""IA3 (Liu et al. 2022, arXiv 2205.05638): learned factors on keys, values, and what the MLP's last layer is given.

All factors are 1 at first, so that a freshly attached model gives exactly the base's logits.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from lit_gpt.kernels import functional
from lit_gpt.methods.decoding_tape import DecodingTape
from lit_gpt.methods.hyperparameters import IA3Config
from lit_gpt.methods.method import LinearWrapper, Method, experts_of, mark_trainable, with_weight
from lit_gpt.model.gpt import GPT, Block
from lit_gpt.model.moe import Experts, Routing, scaled_by_expert
from lit_gpt.quantization.modules import weight_of


class IA3(Method):
    """Trains factors of keys, values and the MLP's inner activations, which can be folded into the weights."""

    name = "ia3"
    merges = True
    config: IA3Config

    def attach(self, model: GPT) -> GPT:
        return attach(model, self.config)

    def merge(self, model: GPT) -> GPT:
        for path, layer in factor_layers(model).items():
            model.set_submodule(path, layer.folded(model.dtype))
        return model

    def hold_merge(self, model: GPT) -> None:
        for layer in factor_layers(model).values():
            layer.merged()


class FactorLayer(LinearWrapper):
    """Holds the factors of a layer in float32."""

    trained_parameters = ("factors",)

    def __init__(self, linear: nn.Module, size: int) -> None:
        super().__init__(linear)
        device = next(linear.parameters()).device
        self.factors = nn.Parameter(torch.ones(*self.experts, size, device=device, dtype=torch.float32))

    def merged(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight with the factors in it, in `dtype` or the base's, which is float32 if that is quantized."""
        raise NotImplementedError

    @torch.no_grad()
    def merged_parameter(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight as `merged` does, or another parameter of the base."""
        return self.merged(dtype) if name == "weight" else self.linear.get_parameter(name).detach()

    @torch.no_grad()
    def folded(self, dtype: torch.dtype) -> nn.Module:
        """Return the layer below with the factors in its weight, in `dtype` if it was quantized."""
        return with_weight(self.linear, self.merged(), dtype)


class ScaledKeysValues(FactorLayer):
    """The layer of queries, keys and values, of whose rows those from `start` to `stop` are scaled."""

    def __init__(self, linear: nn.Module, start: int, stop: int) -> None:
        super().__init__(linear, stop - start)
        self.start, self.stop = start, stop

    def all_factors(self) -> Tensor:
        """Return the factors of all rows, float32 (out_features,): 1 where none train."""
        ones = self.factors.new_ones
        return torch.cat((ones(self.start), self.factors, ones(self.out_features - self.stop)))

    def forward(self, x: Tensor) -> Tensor:
        factors = self.all_factors()
        return functional.scaled(self.linear(x), factors, torch.zeros_like(factors))

    def record(self, tape: DecodingTape, x: Tensor, name: str) -> Tensor:
        """Add the layer to a decoding tape."""
        y, factors = tape.linear(self.linear, x, name), self.all_factors()
        tape.scale(y, factors, torch.zeros_like(factors))
        return y

    @torch.no_grad()
    def merged(self, dtype: torch.dtype | None = None) -> Tensor:
        base = weight_of(self.linear)
        return (base.float() * self.all_factors().unsqueeze(1)).to(dtype or base.dtype)

    @torch.no_grad()
    def merged_parameter(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        own = super().merged_parameter(name, dtype)
        return own.float() * self.all_factors() if name == "bias" else own

    @torch.no_grad()
    def folded(self, dtype: torch.dtype) -> nn.Module:
        linear = super().folded(dtype)
        bias = getattr(linear, "bias", None)
        if isinstance(linear, nn.Linear) and bias is not None:
            linear.bias = nn.Parameter((bias.float() * self.all_factors()).to(bias.dtype), requires_grad=False)
        return linear


class InputFactors(FactorLayer):
    """Holds factors for the input of the last layer of an MLP, or of that of experts."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__(linear, cast(Experts, linear).in_features)

    @torch.no_grad()
    def merged(self, dtype: torch.dtype | None = None) -> Tensor:
        base = weight_of(self.linear)
        return (base.float() * self.factors.unsqueeze(-2)).to(dtype or base.dtype)


class ScaledInput(InputFactors):
    """The last layer of an MLP, whose input is scaled."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(functional.scaled(x, self.factors, torch.zeros_like(self.factors)))

    def record(self, tape: DecodingTape, x: Tensor, name: str) -> Tensor:
        """Add the layer to a decoding tape. What it is given is for it alone, and is scaled in place."""
        tape.scale(x, self.factors.detach(), torch.zeros_like(self.factors))
        return tape.linear(self.linear, x, name)


class ScaledExpertsInput(InputFactors):
    """The last layer of a layer's experts, each with factors of its own for what it is given."""

    def forward(self, x: Tensor, routes: Routing) -> Tensor:
        scaled = scaled_by_expert(x, self.factors, torch.zeros_like(self.factors), routes.groups)
        return self.linear(scaled, routes)


def attach(model: GPT, config: IA3Config) -> GPT:
    """Give the model's layers their factors, in place, and let only these train."""
    for block in cast(Iterable[Block], model.h):
        q, k, v = block.attn.sizes if block.attn is not None else (0, 0, 0)
        start, stop = (q if config.key else q + k), (q + k + v if config.value else q + k)
        if start < stop and block.attn is not None:
            block.attn.set_submodule("qkv", ScaledKeysValues(block.attn.qkv, start, stop))
        if config.mlp and block.mlp is not None:
            proj = block.mlp.get_submodule("proj")
            block.mlp.proj = (ScaledExpertsInput if experts_of(proj) else ScaledInput)(proj)
    mark_trainable(model)
    return model


def factor_layers(model: GPT) -> dict[str, FactorLayer]:
    """Return the layers that have factors, by their paths."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FactorLayer)}
