"""Where a model's tensors lie in a GGUF file: one table for reading and writing.

llama.cpp has one set of names for all architectures; the gguf package maps those of transformers to them. A family says
what is different about its own in `gguf(config)`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lit_gpt import weights
from lit_gpt.config import Config
from lit_gpt.errors import UserError

ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Layout:
    """How llama.cpp has a family's models.

    Attributes:
        architecture: what llama.cpp calls it, and what its metadata begins with.
        activations: those that it computes, by their names here.
        interleaved: the rows of queries and keys are in another order: the two elements of a rotated pair are
            neighbours there, and half a head apart in transformers.
        norm_offset: what is added to the weights of norms.
        keeps_window: it knows the sliding window; else the context is cut to it, within which there is none.
        metadata: what this architecture has besides what all have; keys without the architecture.
        unread: why transformers cannot read such a file back, if it cannot.
    """

    architecture: str
    activations: tuple[str, ...] = ("silu",)
    interleaved: bool = False
    norm_offset: float = 0.0
    keeps_window: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    unread: str = ""


def layout_of(config: Config) -> Layout:
    """Raises UserError if llama.cpp does not know the family, or not with these settings."""
    from lit_gpt.families import family_of_config

    family = family_of_config(config)
    if not hasattr(family, "gguf"):
        raise UserError(f"--format gguf: the {config.family} family has no layout of llama.cpp here; export it as hf")
    layout = family.gguf(config)
    if config.activation not in layout.activations:
        known = " or ".join(layout.activations)
        raise UserError(
            f"--format gguf: llama.cpp computes {layout.architecture} with {known}, not {config.activation}"
        )
    return layout


@dataclass(frozen=True)
class Place:
    """A tensor of the GGUF file, and what it is here."""

    name: str
    row: weights.Row
    index: int | None  # of the row's tensors in the Hugging Face file; None: it is the row as it is here
    heads: int = 0  # of which each is interleaved, if above 0
    offset: float = 0.0

    def to_gguf(self, tensor: Tensor) -> Tensor:
        """From the lit tensor of the row."""
        tensor = tensor if self.index is None else self.row.place.to_hf(tensor)[self.index]
        tensor = interleave(tensor, self.heads) if self.heads else tensor
        return tensor.float() + self.offset if self.offset else tensor

    def to_hf(self, tensor: Tensor) -> Tensor:
        """From the GGUF file's tensor to that of the Hugging Face file; the inverse."""
        tensor = tensor - self.offset if self.offset else tensor
        tensor = uninterleave(tensor, self.heads) if self.heads else tensor
        return self.row.place.to_hf(tensor)[0] if self.index is None else tensor

    @property
    def hf(self) -> str:
        return self.row.hf[self.index or 0]


def places(config: Config, layout: Layout) -> Iterator[Place]:
    """The table written out for a model.

    Raises:
        UserError: llama.cpp has no name for one of its tensors.
    """
    import gguf  # not for those who only read a family's file

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[layout.architecture], config.n_layer)
    heads = {"attn_q": config.n_head, "attn_k": config.n_query_groups} if layout.interleaved else {}
    for row in weights.rows(config):
        fused = isinstance(
            row.place, weights.Grouped
        )  # llama.cpp has the queries first, then keys, then values: so do we
        for index, hf in enumerate(row.hf):
            name = names.get_name(hf, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise UserError(f"--format gguf: llama.cpp's {layout.architecture} has no place for the tensor {hf}")
            offset = layout.norm_offset if "norm" in name and name.endswith(".weight") else 0.0
            yield Place(name, row, None if fused else index, heads.get(name.split(".")[-2], 0), offset)


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from transformers' order, in which the two elements of a rotated pair are half a head apart, to
    that of llama.cpp, in which they are neighbours. A weight or a bias."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def uninterleave(tensor: Tensor, heads: int) -> Tensor:
    """The inverse."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
