"""Which rows of our layers PEFT's pairs of A and B hold, in both directions.

A fused layer here has an A and a B for each projection in it; PEFT has one pair for each linear layer of transformers.
The family's weight table says which rows of ours each of those holds. A projection that transformers has apart gets
its pair as it is. A layer that it has fused gets the A's of its projections one below the other and their B's side by
side, each in its own rows: a pair of r times as many ranks as projections, and the same update exactly.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.conversion import weights
from lit_gpt.errors import UserError
from lit_gpt.families.registry import family_of_config
from lit_gpt.methods import lora
from lit_gpt.methods.hyperparameters import SWITCHES
from lit_gpt.model.config import Config
from lit_gpt.model.gpt import GPT
from lit_gpt.quantization.modules import weight_of

Pairs = dict[str, tuple[Tensor, Tensor]]  # {layer of transformers: A (r, in_features) and B (out_features, r)}
Part = tuple[str, tuple[int, int]]  # the path of a layer here, and start and stop of a projection's rows in it


@dataclass(frozen=True)
class Layer:
    """A linear layer of transformers."""

    name: str  # the module's
    stored: str  # the name in files, which may be another than the module's since transformers 5
    lit: str  # the layer here that holds its rows
    rows: Tensor  # which of that layer's rows, in its own order; int64 (out_features,)


def layers(config: Config) -> Iterator[Layer]:
    """Yield the layers of transformers that hold a matrix; a tied head too, for it can have an adapter of its own."""
    modules = getattr(family_of_config(config), "MODULES", {})
    for row in weights.rows(replace(config, tie_embeddings=False)):
        if len(row.shape) == 2 and row.lit.endswith(".weight"):
            parts = row.place.to_hf(torch.arange(row.shape[0]))
            for name, rows in zip(row.hf, parts, strict=True):
                stored = name.removesuffix(".weight")
                yield Layer(modules.get(stored, stored), stored, row.lit.removesuffix(".weight"), rows)


def to_peft(model: GPT, scale: float) -> Pairs:
    """Return the pairs of a model with LoRA attached, under the names of transformers.

    Args:
        scale: of the products B A; what a layer has besides goes into its B.
    """
    attached, pairs = lora.lora_layers(model), {}
    known = list(layers(model.config))
    if apart := attached.keys() - {layer.lit for layer in known}:
        raise UserError(f"LoRA of {min(apart)} cannot be a PEFT adapter: transformers has no linear layer there")
    for layer in known:
        if layer.lit not in attached:
            continue
        ours, As, Bs = attached[layer.lit], [], []
        for (start, stop), A, B in ours.pairs():
            own = (start <= layer.rows) & (layer.rows < stop)
            if own.any():
                As.append(A.detach())
                Bs.append(B.new_zeros(len(layer.rows), ours.rank))
                Bs[-1][own] = B.detach()[layer.rows[own] - start] * (ours.scale / scale)
        if As:
            pairs[layer.name] = torch.cat(As), torch.cat(Bs, dim=1)
    return pairs


@torch.no_grad()
def to_magnitudes(model: GPT) -> dict[str, Tensor]:
    """Return DoRA's magnitudes (out_features,), by the names of transformers: the norm where a row is not adapted."""
    attached, magnitudes = lora.lora_layers(model), {}
    for layer in layers(model.config):
        ours = attached.get(layer.lit)
        if ours is not None and ours.magnitude is not None:
            whole = weight_of(ours.linear).float().norm(dim=1)
            for (start, stop), own in zip(ours.parts, ours.magnitude.split(ours.sizes), strict=True):
                whole[start:stop] = own
            magnitudes[layer.name] = whole[layer.rows]
    return magnitudes


def lora_switches(config: Config) -> dict[Part, str]:
    """Return {what LoRA can adapt: the switch of LoRAConfig for it}."""
    with torch.device("meta"):
        model = GPT(config)
    off: dict[str, Any] = dict.fromkeys(SWITCHES, False)
    return {
        (path, span): name
        for name in SWITCHES
        for path, spans in lora.targets(model, lora.LoRAConfig(**off | {name: True}))
        for span in spans
    }


def split(
    layer: Layer, A: Tensor, B: Tensor, spans: list[tuple[int, int]], folder: Path
) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
    """Yield the rows of each projection that a layer of transformers holds, and its A and B.

    In a fused layer a projection keeps the ranks that reach its rows; one that none reaches has no update. So what
    `to_peft` put together comes apart as it was. In an adapter that has not been trained, B is zero and all are kept.
    """
    in_layer = [span for span in spans if bool(((span[0] <= layer.rows) & (layer.rows < span[1])).any())]
    if not in_layer:
        raise UserError(f"{folder}: adapts {layer.name}, for which there is no switch here")
    if len(layer.rows) != len(B):
        raise UserError(f"{folder}: B of {layer.name} is {tuple(B.shape)}; the model has {len(layer.rows)} rows there")
    for start, stop in in_layer:
        own = ((start <= layer.rows) & (layer.rows < stop)).nonzero().flatten()
        part = torch.zeros(stop - start, B.shape[1])
        part[layer.rows[own] - start] = B[own]
        reach = part.any(dim=0) if len(in_layer) > 1 and B.any() else torch.ones(B.shape[1], dtype=torch.bool)
        if reach.any():
            yield (start, stop), A[reach], part[:, reach]


def lay_out(
    config: Config, settings: lora.LoRAConfig, updates: Mapping[Part, tuple[Tensor, Tensor, float]]
) -> dict[str, Tensor]:
    """Return the LoRA parameters of a model with these settings: A, and scaled B, of the updates, zeros elsewhere."""
    with torch.device("meta"):
        model = lora.attach(GPT(config), settings)
    state: dict[str, Tensor] = {}
    for path, layer in lora.lora_layers(model).items():
        As, Bs = torch.zeros(layer.lora_A.shape), torch.zeros(layer.lora_B.shape)
        sizes, columns = [stop - start for start, stop in layer.parts], As.shape[1]
        for span, own_A, own_B in zip(layer.parts, As.split(settings.r), Bs.split(sizes), strict=True):
            if (path, span) in updates:
                A, B, scale = updates[path, span]
                if A.shape[1] != columns:
                    raise UserError(f"the adapter's A for {path} is {tuple(A.shape)}; expected {columns} columns")
                own_A[: len(A)] = A
                own_B[:, : len(A)] = B * (scale / settings.scale)
        state |= {f"{path}.lora_A": As, f"{path}.lora_B": Bs}
    return state


def lay_out_magnitudes(
    config: Config, settings: lora.LoRAConfig, magnitudes: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the magnitudes of a model with these settings, where the adapter has none the norms of the base's rows."""
    with torch.device("meta"):
        model = lora.attach(GPT(config), settings)
    known, state = list(layers(config)), {}
    for path, ours in lora.lora_layers(model).items():
        whole = base.get(f"{path}.weight", base["wte.weight"]).float().norm(dim=1)
        for layer in known:
            if layer.lit == path and layer.name in magnitudes:
                whole[layer.rows] = magnitudes[layer.name]
        state[f"{path}.magnitude"] = ours.by_part(whole)
    return state
