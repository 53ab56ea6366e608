"""How a family lays out its tensors: data that conversion runs in both directions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """One module's tensor, stored as it is."""

    modules: tuple[str, ...]

    def to_lit(self, tensors: list[Tensor]) -> Tensor:
        return tensors[0]

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]


@dataclass(frozen=True)
class Stacked(Place):
    """Several modules' rows, one below the other: separate projections that are one product here."""

    sizes: tuple[int, ...]

    def to_lit(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors)

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.split(self.sizes))


@dataclass(frozen=True)
class Transposed(Place):
    """A linear layer whose weight is stored as (in_features, out_features)."""

    def to_lit(self, tensors: list[Tensor]) -> Tensor:
        return tensors[0].t()

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.t()]


@dataclass(frozen=True)
class PerExpert(Stacked):
    """The same modules for each expert: the first expert's, then the second's and so on; `sizes` are one expert's."""

    def to_lit(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors).unflatten(0, (-1, sum(self.sizes)))  # (experts, out_features, in_features)

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.flatten(0, 1).split(self.sizes * len(tensor)))


@dataclass(frozen=True)
class Grouped(Place):
    """A fused projection whose rows go group by group, each group's queries, key and value together."""

    groups: int
    queries: int  # query heads per group

    def to_lit(self, tensors: list[Tensor]) -> Tensor:
        rows = tensors[0].unflatten(0, (self.groups, self.queries + 2, -1))
        return torch.cat([part.flatten(0, 2) for part in rows.split((self.queries, 1, 1), dim=1)])

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        heads = tensor.unflatten(0, (self.groups * (self.queries + 2), -1))
        parts = heads.split((self.groups * self.queries, self.groups, self.groups))
        return [torch.cat([part.unflatten(0, (self.groups, -1)) for part in parts], dim=1).flatten(0, 2)]


Table = Mapping[str, str | Place]


@dataclass(frozen=True)
class Layout:
    """How llama.cpp lays out a family's models.

    Attributes:
        architecture: its name in llama.cpp, with which the keys of its metadata begin.
        activations: those that llama.cpp computes, by their names here.
        interleaved: the rows of queries and keys are in another order: the two elements of a rotated pair are
            neighbors there, and half a head apart in transformers.
        norm_offset: what is added to the weights of norms.
        keeps_window: llama.cpp knows the sliding window; else the context is cut to it, within which there is none.
        metadata: keys, without the architecture, and values that this architecture has besides what all have.
        unread: why transformers cannot read such a file back, if it cannot.
    """

    architecture: str
    activations: tuple[str, ...] = ("silu",)
    interleaved: bool = False
    norm_offset: float = 0.0
    keeps_window: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    unread: str = ""
