"""LoRA (Hu et al. 2021, arXiv 2106.09685): each chosen projection W gets an update (alpha / r) B A of rank r.

Attaches to a base GPT that exists, by wrapping its linear layers. What A and B are made of differs by method, see
lit_gpt.methods.lora_factors; at first the update is zero, so that a freshly attached model gives exactly the base's
logits.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.checkpoints import io
from lit_gpt.errors import UsageError, UserError
from lit_gpt.hardware import on_meta
from lit_gpt.kernels import fused
from lit_gpt.methods import finetuned_file, lora_init
from lit_gpt.methods.hyperparameters import LoRAConfig
from lit_gpt.methods.lora_factors import Factors, Parts, SharedFactors
from lit_gpt.methods.method import Method, experts_of, mark_trainable, with_weight
from lit_gpt.methods.recording import DecodingTape
from lit_gpt.model.config import Config
from lit_gpt.model.gpt import GPT, Block
from lit_gpt.model.moe import Experts, Routing, grouped_product
from lit_gpt.quantization.modules import Quantized, QuantizedLinear, weight_of

NAME = "lora"
Target = tuple[str, nn.Module, Parts]  # path of a layer, the layer, and the rows of its adapted projections


class LoRA(Method):
    """Trains low-rank updates of the chosen projections, which can be folded into them."""

    name = NAME
    merges = True
    free_settings = frozenset({"dropout", "lr_ratio"})
    config: LoRAConfig

    def attach(self, model: GPT) -> GPT:
        return attach(model, self.config)

    def initialize(self, model: GPT) -> None:
        lora_init.initialize(lora_layers(model).values(), self.config)

    def learning_rate_ratio(self, name: str) -> float:
        return self.config.lr_ratio if name.endswith("lora_B") else 1.0

    @property
    def unsharded(self) -> str | None:
        plain = LoRAConfig()
        for name in ("update", "init", "train", "lr_ratio"):
            value = getattr(self.config, name)
            if value not in (getattr(plain, name), "multi", "gaussian"):
                return f"--lora_{name} {value}"
        return None

    def merge(self, model: GPT) -> GPT:
        return merge(model)

    def hold_merge(self, model: GPT) -> None:
        for layer in lora_layers(model).values():
            layer.merged()


class LoRALayer(Factors):
    """Holds low-rank updates of some rows of a layer, in float32; for products they are cast to the input's dtype."""

    @torch.no_grad()
    def merged(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the base's weight plus the updates, in the weight's shape, computed in float32.

        Args:
            dtype: of the sum; None: the base's. Where the base is quantized, the updates are added to the dequantized
                weight, and the sum stays float32.
        """
        base = weight_of(self.linear)
        weight = base.to(torch.float32, copy=True)  # the original may be tied, or mapped
        for (start, stop), A, B in self.pairs():
            weight[..., start:stop, :] += self.scale * (B @ A)
        if self.magnitude is not None:
            for (start, stop), lengths in zip(self.parts, self.magnitude.split(self.sizes), strict=True):
                rows = weight[start:stop]
                rows *= (lengths / rows.norm(dim=1)).unsqueeze(1)
        return weight.to(dtype or base.dtype)


class LoRALinear(LoRALayer):
    """A linear layer with low-rank updates."""

    def forward(self, x: Tensor) -> Tensor:
        rows, dropout = x.reshape(-1, self.in_features), self.dropout if self.training else 0.0
        A, B = self.factors()
        y = self.linear(rows)  # of rows it is no view even with a bias, and views are dear to change in place
        y = fused.low_rank_update(y, rows, A, B, self.parts, self.scale, dropout)
        scale = self.output_scale(A, B)
        if scale is not None:
            y = fused.scaled(y, scale, self.shift(scale))
        return y.view(*x.shape[:-1], self.out_features)

    def shift(self, scale: Tensor) -> Tensor:
        """Return what is to be added to the output before it is scaled, so that its bias stays as it is."""
        bias = getattr(self.linear, "bias", None)
        return torch.zeros_like(scale) if bias is None else bias.float() / scale - bias.float()

    def record(self, tape: DecodingTape, x: Tensor, name: str) -> Tensor:
        """Add the layer to a decoding tape."""
        A, factor = self.factors()[0], self.scale
        low = tape.lora_down(A.to(tape.dtype), x, by_row=False)
        y = tape.linear(self.linear, x, name)
        for part, (rows, _, B) in enumerate(self.pairs()):
            tape.lora_up(y, low, part * self.rank, (B * factor).to(tape.dtype).t().contiguous(), rows, by_row=False)
        scale = self.output_scale(*self.factors())
        if scale is not None:
            tape.scale(y, scale, self.shift(scale))
        return y


class LoRAExperts(LoRALayer):
    """A layer of experts with low-rank updates: A and B are (n_expert, ...), and each expert has its own."""

    def forward(self, x: Tensor, routes: Routing) -> Tensor:
        """Return (rows, out_features) of x (rows, in_features), whose rows are sorted by expert."""
        dropped = F.dropout(x, self.dropout, self.training)
        A, B = self.factors()
        low = grouped_product(dropped, A, routes.counts).split(self.rank, dim=-1)
        parts = zip(low, B.split(self.sizes, dim=-2), strict=True)
        updates = [grouped_product(*pair, routes.counts) for pair in parts]
        return self.linear(x, routes).add(torch.cat(updates, dim=-1), alpha=self.scale)


def attach(model: GPT, config: LoRAConfig) -> GPT:
    """Wrap the chosen projections of `model`, in place, and let only the updates train.

    What starts from the base's weights gets its start from `lora_init.initialize`.

    Raises:
        UsageError: the form of the updates does not go with some layer.
    """
    wanted = [(path, model.get_submodule(path), parts) for path, parts in targets(model, config)]
    check_layers(wanted, config, model.config)
    shared = shared_factors(wanted, config)
    if shared:
        model.lora_shared = nn.ModuleDict(shared)
    for path, layer, parts in wanted:
        wrapper = LoRAExperts if experts_of(layer) else LoRALinear
        model.set_submodule(path, wrapper(layer, parts, config, shared.get(kind_of(path, config))))
    mark_trainable(model)
    return model


def check_layers(wanted: list[Target], config: LoRAConfig, base: Config) -> None:
    """Refuse layers for which the form or the start of the updates does not exist."""
    for path, layer, parts in wanted:
        if config.update == "dora" and experts_of(layer):
            raise UsageError(f"--lora_update dora: {base.name} has experts in {path}; leave out --lora_mlp true")
        sizes = cast(Experts, layer)  # for mypy
        limit = min(sizes.in_features, *(stop - start for start, stop in parts))
        if config.changes_start and config.r > limit:
            raise UsageError(
                f"--lora_init {config.init}: {path} has only rank {limit}; expected --lora_r of at most that"
            )


def kind_of(path: str, config: LoRAConfig) -> str:
    """Return the name of the matrices that a layer shares with others; what is no name of any if it shares none."""
    return "all" if config.update == "vera" else re.sub(r"^h\.\d+\.", "", path).replace(".", "_")


def shared_factors(wanted: list[Target], config: LoRAConfig) -> dict[str, SharedFactors]:
    """Return the matrices that layers share, by their kind: vera's, of the largest sizes, are of all layers."""
    if config.update not in ("vera", "tied"):
        return {}
    device = next(wanted[0][1].parameters()).device
    if config.update == "vera":
        inputs = max(cast(Experts, layer).in_features for _, layer, _ in wanted)
        rows = max(stop - start for _, _, parts in wanted for start, stop in parts)
        return {"all": SharedFactors((config.r, inputs), (rows, config.r), config, device)}
    shared = {}
    for path, layer, parts in wanted:
        kind = kind_of(path, config)
        if kind not in shared and path.startswith("h."):  # the head is the only one of its kind
            A = (*experts_of(layer), len(parts) * config.r, cast(Experts, layer).in_features)
            B = (*experts_of(layer), sum(stop - start for start, stop in parts), config.r)
            shared[kind] = SharedFactors(A, B, config, device)
    return shared


def targets(model: GPT, config: LoRAConfig) -> Iterator[tuple[str, Parts]]:
    """Yield the path of each linear layer to adapt, and the rows (start, stop) of its adapted projections."""
    n = model.config.n_embd
    for layer, block in enumerate(cast(Iterable[Block], model.h)):
        mixer = f"h.{layer}." + ("mixer" if block.attn is None else "attn")
        projections = block.token_mixer.projections.items()
        if qkv := sorted(span for name, spans in projections if getattr(config, name) for span in spans):
            yield f"{mixer}.qkv", qkv
        if config.projection:
            yield f"{mixer}.proj", [(0, n)]
        if config.mlp and block.mlp is not None:
            yield from ((f"h.{layer}.mlp.{path}", parts) for path, parts in mlp_targets(block.mlp))
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

    A is (len(parts) * rank, in_features), and B (out_features, len(parts) * rank) with the scale in it and zeros where
    a part's rows and another's columns meet; before them is the number of experts, in a layer of experts.

    Raises:
        UserError: the tensors contradict the configuration, or the update is not a product of two matrices.
    """
    if config.update == "dora":
        raise UserError(
            f"{source}: trained with lora_update dora, which scales whole rows of the base; merge it instead"
        )
    with on_meta():
        model = attach(GPT(base), config)
    io.check_state(finetuned_file.file_parameters(model), state, source)
    model.load_state_dict(state, strict=False, assign=True)
    model.requires_grad_(False)
    for path, layer in lora_layers(model).items():
        A, rank = layer.factors()[0], layer.rank
        B = A.new_zeros(*layer.experts, layer.out_features, len(layer.parts) * rank)
        for i, ((start, stop), _, part) in enumerate(layer.pairs()):
            B[..., start:stop, i * rank : (i + 1) * rank] = part * layer.scale
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
        model.set_submodule(path, with_weight(linear, layer.merged(), model.dtype))
    model._modules.pop("lora_shared", None)
    model.config = config
    return model


def merged_config(model: GPT) -> Config:
    """Return the Config of the merged model, in which a tied head that was adapted is a weight of its own."""
    return replace(model.config, tie_embeddings=False) if "lm_head" in lora_layers(model) else model.config


def write_merged(path: Path, model: GPT, dtype: torch.dtype | None = None) -> None:
    """Write the state dict of the merged model, dequantized if it is quantized, holding one tensor at a time.

    Args:
        dtype: in which to store it; None: as the base is.
    """
    config = merged_config(model)
    with on_meta():
        names = GPT(config).state_dict()
    if config.tie_embeddings:
        del names["lm_head.weight"]  # the embedding's
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    layout = {name: names[name].to(dtype or stored_dtype(name, layer, model.dtype)) for name, layer in layers.items()}
    io.write_streamed(path, layout, ((name, merged_tensor(name, layer, dtype)) for name, layer in layers.items()))


def stored_dtype(name: str, layer: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a layer's tensor has once merged: `dtype` if the layer is quantized now, else its own."""
    layer = layer.linear if isinstance(layer, LoRALayer) else layer
    return dtype if isinstance(layer, Quantized) else getattr(layer, name.rpartition(".")[2]).dtype


def merged_tensor(name: str, layer: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """Return the tensor `name` of a layer, its weight with the layer's update added if it has one."""
    if not name.endswith(".weight"):
        return getattr(layer.linear if isinstance(layer, LoRALayer) else layer, name.rpartition(".")[2])
    return layer.merged(dtype) if isinstance(layer, LoRALayer) else weight_of(layer)
