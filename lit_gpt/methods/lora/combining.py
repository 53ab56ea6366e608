"""Makes one LoRA of several: their weighted sum, or what TIES or DARE keep of them.

sum   w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2 + ...: the A's one below the other and the B's side by side, exactly
ties  of each update the largest entries are kept, the sign of each entry is that of the sum, and those of that sign are
      averaged (Yadav et al. 2023, arXiv 2306.01708)
dare  of each update random entries are kept and enlarged, so that its mean stays, and all are added (Yu et al. 2023,
      arXiv 2311.03099)

Updates are combined, not their A's and B's, whose product is what was learned. The best approximation of a rank brings
a sum down to fewer ranks, and what ties and dare give back to a LoRA.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.methods.hyperparameters import SWITCHES, LoRAConfig
from lit_gpt.methods.lora.attaching import load_layers, skeleton
from lit_gpt.methods.lora.layers import lora_layers
from lit_gpt.methods.lora.starts import pissa
from lit_gpt.model.config import Config

Rows = tuple[int, int]  # start and stop of a projection in its layer
Pair = tuple[Tensor, Tensor]  # A (rank, in_features) and B (rows, rank) of a projection, the weight and scale in B


@dataclass(frozen=True)
class Ingredient:
    """A LoRA file, and the weight that it is to have.

    Attributes:
        config, state: what `finetuned_file.read_file` has read.
    """

    path: Path
    weight: float
    config: LoRAConfig
    state: Mapping[str, Tensor]

    def pairs(self, base: Config) -> dict[tuple[str, Rows], Pair]:
        """Return A and B by the path of the layer and the rows of the projection in it.

        Raises:
            UserError: the tensors contradict the configuration, or the update is no product of two matrices.
        """
        layers = load_layers(skeleton(base, self.config), self.state, self.path)
        return {
            (path, rows): (A.float(), B.float() * (layer.scale * self.weight))
            for path, layer in layers.items()
            for rows, A, B in layer.pairs()
        }


@torch.no_grad()
def combine(
    base: Config, files: Sequence[Ingredient], how: str, r: int | None, density: float, generator: torch.Generator
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """Return the settings and the state of a LoRA that combines others.

    Args:
        how: sum, ties or dare.
        r: its rank; None: of a sum what it takes to be exact, else the largest of the ranks.
        density: the share of entries that ties and dare keep.

    Raises:
        UserError: a file cannot be one of several.
        UsageError: no layer has room for the rank.
    """
    parts = [file.pairs(base) for file in files]
    ranks = [max(A.size(-2) for A, _ in pairs.values()) for pairs in parts]
    rank = r or (sum(ranks) if how == "sum" else max(ranks))
    adapted: dict[str, Any] = {name: any(getattr(file.config, name) for file in files) for name in SWITCHES}
    config = replace(LoRAConfig(), r=rank, alpha=rank, dropout=files[0].config.dropout, **adapted)
    state: dict[str, Tensor] = {}
    for path, layer in lora_layers(skeleton(base, config)).items():
        found = []
        for rows in layer.parts:
            pairs = [own[path, rows] for own in parts if (path, rows) in own]
            if how == "sum":
                A, B = torch.cat([A for A, _ in pairs], dim=-2), torch.cat([B for _, B in pairs], dim=-1)
                found.append(with_rank(*(shorten(A, B, rank) if A.size(-2) > rank else (A, B)), rank))
            else:
                found.append(with_rank(*pissa(blend(pairs, how, density, generator), rank, 1.0), rank))
        state |= {
            f"{path}.lora_{name}": torch.cat(halves, dim=-2)
            for name, halves in zip("AB", zip(*found, strict=True), strict=True)
        }
    return config, state


def shorten(A: Tensor, B: Tensor, r: int) -> Pair:
    """Return the best approximation of B A of rank r at most; the product is never made."""
    (QA, RA), (QB, RB) = torch.linalg.qr(A.mT), torch.linalg.qr(B)
    A, B = pissa(RB @ RA.mT, r, 1.0)
    return A @ QA.mT, QB @ B


def with_rank(A: Tensor, B: Tensor, r: int) -> Pair:
    """Return A and B with zeros for the ranks that they lack."""
    lacking = r - A.size(-2)
    return F.pad(A, (0, 0, 0, lacking)), F.pad(B, (0, lacking))


def blend(pairs: list[Pair], how: str, density: float, generator: torch.Generator) -> Tensor:
    """Return the update (..., rows, in_features) of a projection that ties or dare makes."""
    updates = torch.stack([B @ A for A, B in pairs])
    return ties(updates, density) if how == "ties" else dare(updates, density, generator).sum(0)


def ties(updates: Tensor, density: float) -> Tensor:
    """Return the mean of those of the largest entries whose sign is that of their sum.

    Args:
        updates: (n, ...), the weights in them.
        density: the share of entries of each that counts; the others are taken to be 0.
    """
    flat = updates.flatten(1).abs()
    kept = max(1, round(density * flat.size(1)))
    least = flat.kthvalue(flat.size(1) - kept + 1, dim=1).values
    trimmed = updates * (updates.abs() >= least.view(-1, *(1,) * (updates.ndim - 1)))
    agree = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    return (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)


def dare(updates: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return the updates with a random share of their entries, divided by that share, and zeros in the others."""
    return updates * (torch.rand(updates.shape, generator=generator) < density) / density
