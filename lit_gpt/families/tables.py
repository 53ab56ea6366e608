"""How a family lays out its tensors: data that conversion runs in both directions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """One module's tensor, stored as it is."""

    modules: tuple[str, ...]

    def name(self, module: str, kind: str) -> str:
        """Return the name of a module's tensor; `kind` is "weight", "bias" or what else the tensor is called here."""
        return f"{module}.{kind}"

    def to_lit(self, tensors: list[Tensor]) -> Tensor:
        return tensors[0]

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]


@dataclass(frozen=True)
class Named(Place):
    """One tensor under its whole name."""

    def name(self, module: str, kind: str) -> str:
        return module


@dataclass(frozen=True)
class Stacked(Place):
    """Several modules' rows, one below the other: separate projections that are one product here."""

    sizes: tuple[int, ...]

    def to_lit(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors)

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.split(self.sizes))


@dataclass(frozen=True)
class Squeezed(Place):
    """One module's tensor, stored without a dimension of size 1."""

    dim: int

    def to_lit(self, tensors: list[Tensor]) -> Tensor:
        return tensors[0].unsqueeze(self.dim)

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.squeeze(self.dim)]


@dataclass(frozen=True)
class PerHead(Place):
    """The weights of a norm for each head, stored (heads, head_size)."""

    head_size: int

    def to_lit(self, tensors: list[Tensor]) -> Tensor:
        return tensors[0].flatten()

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.unflatten(0, (-1, self.head_size))]


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
class AllExperts(Place):
    """All experts' weights in one tensor (experts, in_features, out_features), biases (experts, out_features).

    Attributes:
        alternating: the rows of gate and up alternate.
    """

    alternating: bool = False

    def name(self, module: str, kind: str) -> str:
        return module if kind == "weight" else f"{module}_{kind}"

    def to_lit(self, tensors: list[Tensor]) -> Tensor:
        rows = tensors[0].mT if tensors[0].ndim == 3 else tensors[0]
        return torch.cat((rows[:, ::2], rows[:, 1::2]), dim=1) if self.alternating else rows

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        rows = torch.stack(tensor.chunk(2, dim=1), dim=2).flatten(1, 2) if self.alternating else tensor
        return [rows.mT if tensor.ndim == 3 else rows]


@dataclass(frozen=True)
class ExpertStacks(Stacked):
    """All experts' rows of each module in one tensor (experts, sizes[i], in_features)."""

    def to_lit(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors, dim=1)

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        return list(tensor.split(self.sizes, dim=1))


@dataclass(frozen=True)
class Offset(Place):
    """A tensor that is stored with a number added to it, in float32."""

    amount: float

    def to_lit(self, tensors: list[Tensor]) -> Tensor:
        return tensors[0] - self.amount

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.float() + self.amount]


@dataclass(frozen=True)
class Turned(Stacked):
    """Stacked queries, keys and values, with the elements of each query and key in another order.

    A rotation turns pairs of elements; here they are half a head (of its rotated part) apart. Scores do not change
    where queries and keys are reordered alike.
    """

    order: tuple[int, ...]  # which stored element of a head is in each place here

    def to_lit(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat([*(self.reordered(x, self.order) for x in tensors[:2]), tensors[2]])

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        q, k, v = tensor.split(self.sizes)
        return [*(self.reordered(x, inverse(self.order)) for x in (q, k)), v]

    @staticmethod
    def reordered(x: Tensor, order: tuple[int, ...]) -> Tensor:
        return x.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)


@dataclass(frozen=True)
class TurnedNorms(Place):
    """The weights of a norm for each head, stored (heads, head_size), in the order of Turned queries or keys."""

    order: tuple[int, ...]

    def to_lit(self, tensors: list[Tensor]) -> Tensor:
        return tensors[0][:, self.order].flatten()

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.unflatten(0, (-1, len(self.order)))[:, inverse(self.order)]]


@dataclass(frozen=True)
class Reordered(Stacked):
    """Several modules' rows, one below the other, each module's in another order within blocks of rows, such as heads.

    Attributes:
        orders: which stored row of a block is in each place here, for each module.
    """

    orders: tuple[tuple[int, ...], ...]

    def to_lit(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat([Turned.reordered(x, order) for x, order in zip(tensors, self.orders, strict=True)])

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        parts = zip(tensor.split(self.sizes), self.orders, strict=True)
        return [Turned.reordered(x, inverse(order)) for x, order in parts]


def neighbors_apart(rotated: int, head_size: int) -> tuple[int, ...]:
    """Return Turned's order for heads in which the two elements of a rotated pair are neighbors."""
    return (*range(0, rotated, 2), *range(1, rotated, 2), *range(rotated, head_size))


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


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


@dataclass(frozen=True)
class Chained(Place):
    """Tensors that go through several layouts, the first nearest to the GPT; the last has the names in the file."""

    steps: tuple[Place, ...]

    def name(self, module: str, kind: str) -> str:
        return self.steps[-1].name(module, kind)

    def to_lit(self, tensors: list[Tensor]) -> Tensor:
        for step in reversed(self.steps):
            tensors = [step.to_lit(tensors)]
        return tensors[0]

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        *steps, last = self.steps
        for step in steps:
            (tensor,) = step.to_hf(tensor)
        return last.to_hf(tensor)


def chained(*steps: Place) -> Chained:
    return Chained(steps[-1].modules, steps)


@dataclass(frozen=True)
class Unsqueezed(Named):
    """One tensor, stored with another dimension of size 1."""

    dim: int

    def to_lit(self, tensors: list[Tensor]) -> Tensor:
        return tensors[0].squeeze(self.dim)

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.unsqueeze(self.dim)]


@dataclass(frozen=True)
class Decay(Place):
    """The logarithms of a recurrence's decay, A = -exp(A_log), of which A is stored in float32.

    Computed in float64, so that what comes back differs by no more than the rounding of A.
    """

    def to_lit(self, tensors: list[Tensor]) -> Tensor:
        return (-tensors[0].double()).log().float()

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        return [-tensor.double().exp().float()]


@dataclass(frozen=True)
class Scaled(Place):
    """A tensor whose rows are stored multiplied; `sizes[i]` rows by `factors[i]`."""

    factors: tuple[float, ...]
    sizes: tuple[int, ...]

    def to_lit(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat([x / f for x, f in zip(tensors[0].split(self.sizes), self.factors, strict=True)])

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        return [torch.cat([x * f for x, f in zip(tensor.split(self.sizes), self.factors, strict=True)])]


@dataclass(frozen=True)
class ReorderedColumns(Place):
    """A weight whose columns are stored in another order; `order`: which stored column is in each place here."""

    order: tuple[int, ...]

    def to_lit(self, tensors: list[Tensor]) -> Tensor:
        return tensors[0][:, self.order]

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        return [tensor[:, inverse(self.order)]]


Table = Mapping[str, str | Place]


@dataclass(frozen=True)
class Layout:
    """How llama.cpp lays out a family's models.

    Attributes:
        architecture: its name in llama.cpp, with which the keys of its metadata begin.
        activations: those that llama.cpp computes, by their names here.
        interleaved: the rows of queries and keys are in another order: the two elements of a rotated pair are
            neighbors there, and half a head apart here.
        norm_offset: what is added to the weights of norms.
        keeps_window: llama.cpp knows the sliding window; else the context is cut to it, within which there is none.
        rounds_yarn: llama.cpp rounds the ends of YaRN's ramp to whole elements where the model does not, and is taken
            as it is.
        scaling: further fields of rotary scaling, which the metadata of this architecture says.
        metadata: keys, without the architecture, and values that this architecture has besides what all have.
        places: where tensors lie in such a file, if not where `lit_gpt.conversion.gguf.layout.places` has them.
        folded: fields of the Config whose factors the stored weights contain, and what they are in a model of these.
        unread: why transformers cannot read such a file back; "": it can.
    """

    architecture: str
    activations: tuple[str, ...] = ("silu",)
    interleaved: bool = False
    norm_offset: float = 0.0
    keeps_window: bool = False
    rounds_yarn: bool = False
    scaling: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    places: Table = field(default_factory=dict)
    folded: dict[str, Any] = field(default_factory=dict)
    unread: str = "does not know the architecture"


class Said(Protocol):
    """What a GGUF file says about its model; keys are without the architecture."""

    architecture: str

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Return a value of the metadata, or the default where it is absent."""

    def need(self, key: str, kind: type) -> Any:
        """Return a value of the metadata; raise UserError where it is absent or not above 0."""

    def each(self, key: str, kind: type) -> list[Any]:
        """Return a value of the metadata for each layer, also where the file has one for all."""

    def holds(self, tensor: str) -> bool:
        """Return whether the file holds a tensor."""

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """Return what config.json has by this name."""
