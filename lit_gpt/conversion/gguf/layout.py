"""Where a model's tensors lie in a GGUF file: one table for reading and writing.

llama.cpp has one set of names for all architectures; the gguf package maps those of transformers to them. A family says
what is different about its own in `gguf(config)`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from lit_gpt.conversion import weights
from lit_gpt.errors import UserError
from lit_gpt.families import tables
from lit_gpt.families.tables import Layout
from lit_gpt.model.config import Config

ROPE_FACTORS = "rope_freqs.weight"


def layout_of(config: Config) -> Layout:
    """Raises UserError if llama.cpp does not know the family, or not with these settings."""
    from lit_gpt.families.registry import family_of_config

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
class TensorPlace:
    """A tensor of the GGUF file, and what it is here."""

    name: str
    row: weights.TensorRow
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


def places(config: Config, layout: Layout) -> Iterator[TensorPlace]:
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
            row.place, tables.Grouped
        )  # llama.cpp has the queries first, then keys, then values: so do we
        for index, hf in enumerate(row.hf):
            name = names.get_name(hf, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise UserError(f"--format gguf: llama.cpp's {layout.architecture} has no place for the tensor {hf}")
            offset = layout.norm_offset if "norm" in name and name.endswith(".weight") else 0.0
            yield TensorPlace(name, row, None if fused else index, heads.get(name.split(".")[-2], 0), offset)


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from transformers' order, in which the two elements of a rotated pair are half a head apart, to
    that of llama.cpp, in which they are neighbours. A weight or a bias."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def uninterleave(tensor: Tensor, heads: int) -> Tensor:
    """The inverse."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
