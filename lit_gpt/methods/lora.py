"""LoRA (Hu et al. 2021, arXiv 2106.09685): each chosen projection W gets an update (alpha / r) B A of rank r.

Attaches to a base GPT that exists, by wrapping its linear layers. A is random and B zero at first, so that a freshly
attached model gives exactly the base's logits.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.checkpoints import io
from lit_gpt.errors import UserError
from lit_gpt.hardware import on_meta
from lit_gpt.kernels import fused
from lit_gpt.methods.hyperparameters import LoRAConfig
from lit_gpt.methods.method import LinearWrapper, Method, experts_of, mark_trainable
from lit_gpt.methods.recording import DecodingTape
from lit_gpt.model.config import Config
from lit_gpt.model.gpt import GPT
from lit_gpt.model.linear import Linear
from lit_gpt.model.moe import Experts, Routing, grouped_product
from lit_gpt.quantization.modules import Quantized, QuantizedLinear, weight_of

NAME = "lora"


class LoRA(Method):
    """Trains low-rank updates of the chosen projections, which can be folded into them."""

    name = NAME
    merges = True
    free_settings = frozenset({"dropout"})
    config: LoRAConfig

    def attach(self, model: GPT) -> GPT:
        return attach(model, self.config)

    def merge(self, model: GPT) -> GPT:
        return merge(model)

    def hold_merge(self, model: GPT) -> None:
        for layer in lora_layers(model).values():
            layer.merged()


class LoRALayer(LinearWrapper):
    """Holds low-rank updates of some rows of a layer, in float32; for products they are cast to the input's dtype.

    Args:
        linear: the base, a module from (..., in_features) to (..., out_features).
        parts: (start, stop) of the rows of each projection within the layer that is adapted; each has its own A and B,
            while the product with all A's is one.
    """

    trained_parameters = ("lora_A", "lora_B")

    def __init__(self, linear: nn.Module, parts: list[tuple[int, int]], config: LoRAConfig) -> None:
        super().__init__(linear)
        self.parts, self.r, self.dropout = parts, config.r, config.dropout
        self.scale = config.alpha / config.r
        self.sizes = [stop - start for start, stop in parts]
        shapes = (*self.experts, len(parts) * self.r, self.in_features), (*self.experts, sum(self.sizes), self.r)
        device = next(linear.parameters()).device
        self.lora_A, self.lora_B = (nn.Parameter(torch.zeros(s, device=device, dtype=torch.float32)) for s in shapes)
        nn.init.kaiming_uniform_(self.lora_A.detach().flatten(0, -2), a=math.sqrt(5))

    def split_B(self) -> tuple[Tensor, ...]:
        """Return the B (..., stop - start, r) of each part."""
        return self.lora_B.split(self.sizes, dim=-2)

    def merged(self) -> Tensor:
        """Return the base's weight plus the updates, in the weight's shape, computed in float32.

        It has the base's dtype. Where the base is quantized, the updates are added to the dequantized weight, and the
        sum stays float32.
        """
        base = weight_of(self.linear)
        weight = base.to(torch.float32, copy=True)  # the original may be tied, or mapped
        with torch.no_grad():
            for (start, stop), A, B in zip(self.parts, self.lora_A.split(self.r, dim=-2), self.split_B(), strict=True):
                weight[..., start:stop, :] += self.scale * (B @ A)
        return weight.to(base.dtype)


class LoRALinear(LoRALayer):
    """A linear layer with low-rank updates."""

    def forward(self, x: Tensor) -> Tensor:
        rows, dropout = x.reshape(-1, self.in_features), self.dropout if self.training else 0.0
        y = self.linear(rows)  # of rows it is no view even with a bias, and views are dear to change in place
        y = fused.low_rank_update(y, rows, self.lora_A, self.lora_B, self.parts, self.scale, dropout)
        return y.view(*x.shape[:-1], self.out_features)

    def record(self, tape: DecodingTape, x: Tensor, name: str) -> Tensor:
        """Add the layer to a decoding tape."""
        low = tape.lora_down(self.lora_A.to(tape.dtype), x, by_row=False)
        y = tape.linear(self.linear, x, name)
        for part, (rows, B) in enumerate(zip(self.parts, self.split_B(), strict=True)):
            tape.lora_up(y, low, part * self.r, (B * self.scale).to(tape.dtype).t().contiguous(), rows, by_row=False)
        return y


class LoRAExperts(LoRALayer):
    """A layer of experts with low-rank updates: A and B are (n_expert, ...), and each expert has its own."""

    def forward(self, x: Tensor, routes: Routing) -> Tensor:
        """Return (rows, out_features) of x (rows, in_features), whose rows are sorted by expert."""
        dropped = F.dropout(x, self.dropout, self.training)
        low = grouped_product(dropped, self.lora_A, routes.counts).split(self.r, dim=-1)
        updates = [grouped_product(*pair, routes.counts) for pair in zip(low, self.split_B(), strict=True)]
        return self.linear(x, routes).add(torch.cat(updates, dim=-1), alpha=self.scale)


def attach(model: GPT, config: LoRAConfig) -> GPT:
    """Wrap the chosen projections of `model`, in place, and let only the updates train."""
    for path, parts in targets(model, config):
        layer = model.get_submodule(path)
        wrapper = LoRAExperts if experts_of(layer) else LoRALinear
        model.set_submodule(path, wrapper(layer, parts, config))
    mark_trainable(model)
    return model


def targets(model: GPT, config: LoRAConfig) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Yield the path of each linear layer to adapt, and the rows (start, stop) of its adapted projections."""
    q, k, v = model.config.qkv_sizes
    spans = {"query": (0, q), "key": (q, q + k), "value": (q + k, q + k + v)}
    qkv = [span for name, span in spans.items() if getattr(config, name)]
    for layer in range(len(model.h)):
        if qkv:
            yield f"h.{layer}.attn.qkv", qkv
        if config.projection:
            yield f"h.{layer}.attn.proj", [(0, model.config.n_embd)]
        if config.mlp:
            yield from (
                (f"h.{layer}.mlp.{path}", parts) for path, parts in mlp_targets(model.get_submodule(f"h.{layer}.mlp"))
            )
    if config.head:
        yield "lm_head", [(0, model.config.padded_vocab_size)]


def mlp_targets(mlp: nn.Module) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Yield what `targets` does of an MLP, of routed and shared experts.

    Gate and up have an update each; which experts a token goes to stays the base's choice.
    """
    for path, layer in mlp.named_modules():
        name, n = path.rpartition(".")[2], getattr(layer, "out_features", 0)
        if name == "gate_up":
            yield path, [(0, n // 2), (n // 2, n)]
        elif name in ("fc", "proj"):
            yield path, [(0, n)]


def updates(
    base: Config, config: LoRAConfig, state: Mapping[str, Tensor], source: Path | str
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the path of each layer of a base that a finetuned file adapts, and A and B, so that B A is its update.

    A is (len(parts) * r, in_features), and B (out_features, len(parts) * r) with the scale in it and zeros where a
    part's rows and another's columns meet; before them is the number of experts, in a layer of experts.

    Raises:
        UserError: the tensors contradict the configuration.
    """
    with on_meta():
        model = attach(GPT(base), config)
    io.check_state({name: p for name, p in model.named_parameters() if p.requires_grad}, state, source)
    for path, layer in lora_layers(model).items():
        A, stacked = state[f"{path}.lora_A"], state[f"{path}.lora_B"]
        B = stacked.new_zeros(*layer.experts, layer.out_features, len(layer.parts) * layer.r)
        for i, ((start, stop), part) in enumerate(zip(layer.parts, stacked.split(layer.sizes, dim=-2), strict=True)):
            B[..., start:stop, i * layer.r : (i + 1) * layer.r] = part * layer.scale
        yield path, A, B


def lora_layers(model: GPT) -> dict[str, LoRALayer]:
    """Return the layers that LoRA is attached to, by their paths."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def merge(model: GPT) -> GPT:
    """Fold the updates into the base's weights and unwrap them, in place. Quantized layers become plain linear ones.

    Raises:
        UserError: another method has changed an adapted layer.
    """
    config = merged_config(model)
    for path, layer in lora_layers(model).items():
        linear = layer.linear
        if not isinstance(linear, nn.Linear | Experts | QuantizedLinear):
            raise UserError(f"LoRA cannot be merged into {path}, which another method has changed; leave it apart")
        weight = layer.merged()
        if isinstance(linear, QuantizedLinear):
            weight, bias = weight.to(model.dtype), linear.bias
            linear = Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            linear.bias = bias
        linear.weight = nn.Parameter(weight, requires_grad=False)
        model.set_submodule(path, linear)
    model.config = config
    return model


def merged_config(model: GPT) -> Config:
    """Return the Config of the merged model, in which a tied head that was adapted is a weight of its own."""
    return replace(model.config, tie_embeddings=False) if "lm_head" in lora_layers(model) else model.config


def write_merged(path: Path, model: GPT) -> None:
    """Write the state dict of the merged model, dequantized if it is quantized, holding one tensor at a time."""
    config = merged_config(model)
    with on_meta():
        names = GPT(config).state_dict()
    if config.tie_embeddings:
        del names["lm_head.weight"]  # the embedding's
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    layout = {name: names[name].to(stored_dtype(name, layer, model.dtype)) for name, layer in layers.items()}
    io.write_streamed(path, layout, ((name, merged_tensor(name, layer)) for name, layer in layers.items()))


def stored_dtype(name: str, layer: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a layer's tensor has once merged: `dtype` if the layer is quantized now, else its own."""
    layer = layer.linear if isinstance(layer, LoRALayer) else layer
    return dtype if isinstance(layer, Quantized) else getattr(layer, name.rpartition(".")[2]).dtype


def merged_tensor(name: str, layer: nn.Module) -> Tensor:
    """Return the tensor `name` of a layer, its weight with the layer's update added if it has one."""
    if not name.endswith(".weight"):
        return getattr(layer.linear if isinstance(layer, LoRALayer) else layer, name.rpartition(".")[2])
    return layer.merged() if isinstance(layer, LoRALayer) else weight_of(layer)
