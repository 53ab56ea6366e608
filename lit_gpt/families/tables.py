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


@dataclass(frozen=True)
class Interleaved(Place):
    """Several modules' rows, one below the other, where a module's go group by group and a group holds all its parts.

    Attributes:
        groups: how many groups each module has.
        parts: rows of each part in a group, for each module; here the rows of a part lie together.
        order: in which order the parts of all modules follow each other here; (): as they come.
    """

    groups: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]
    order: tuple[int, ...] = ()

    def to_lit(self, tensors: list[Tensor]) -> Tensor:
        each = zip(tensors, self.groups, self.parts, strict=True)
        parts = [part.flatten(0, 1) for t, n, sizes in each for part in t.unflatten(0, (n, -1)).split(sizes, dim=1)]
        return torch.cat([parts[i] for i in self._order])

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        sizes = [n * size for n, own in zip(self.groups, self.parts, strict=True) for size in own]
        pieces = tensor.split([sizes[i] for i in self._order])
        by_part = dict(zip(self._order, pieces, strict=True))
        parts = iter(by_part[i] for i in range(len(sizes)))
        return [
            torch.cat([next(parts).unflatten(0, (n, -1)) for _ in own], dim=1).flatten(0, 1)
            for n, own in zip(self.groups, self.parts, strict=True)
        ]

    @property
    def _order(self) -> tuple[int, ...]:
        return self.order or tuple(range(sum(map(len, self.parts))))


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
