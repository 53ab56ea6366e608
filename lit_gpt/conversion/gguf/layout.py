"""Where a model's tensors lie in a GGUF file: one table for reading and writing.

llama.cpp has one set of names for all architectures; the gguf package maps those of transformers to them. A family says
what is different about its own in `gguf(config)`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import gguf
from torch import Tensor

from lit_gpt.conversion import weights
from lit_gpt.errors import UserError
from lit_gpt.families.registry import family_of_config
from lit_gpt.families.tables import Grouped, Layout
from lit_gpt.model.config import Config
from lit_gpt.model.rope import rope_frequencies

ROPE_FACTORS = "rope_freqs.weight"


def layout_of(config: Config) -> Layout:
    """Return the family's layout; raise UserError if llama.cpp does not know the family, or not with these settings."""
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
    """A tensor of the GGUF file, and the row of the weight table that it belongs to."""

    name: str
    row: weights.TensorRow
    index: int | None  # which of the row's tensors in the Hugging Face file it is; None: it is the row's tensor here
    heads: int = 0  # how many heads have interleaved rows; 0: the rows are in transformers' order
    offset: float = 0.0  # what llama.cpp adds to the values

    def to_gguf(self, tensor: Tensor) -> Tensor:
        """Return the GGUF file's tensor for the row's tensor here."""
        tensor = tensor if self.index is None else self.row.place.to_hf(tensor)[self.index]
        tensor = interleave(tensor, self.heads) if self.heads else tensor
        return tensor.float() + self.offset if self.offset else tensor

    def to_hf(self, tensor: Tensor) -> Tensor:
        """Return the Hugging Face file's tensor for the GGUF file's."""
        tensor = tensor - self.offset if self.offset else tensor
        tensor = uninterleave(tensor, self.heads) if self.heads else tensor
        return self.row.place.to_hf(tensor)[0] if self.index is None else tensor

    @property
    def hf(self) -> str:
        """Return the tensor's name in the Hugging Face file."""
        return self.row.hf[self.index or 0]


def places(config: Config, layout: Layout) -> Iterator[TensorPlace]:
    """Yield the table written out for a model.

    Raises:
        UserError: llama.cpp has no name for one of its tensors.
    """
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[layout.architecture], config.n_layer)
    heads = {"attn_q": config.n_head, "attn_k": config.n_query_groups} if layout.interleaved else {}
    for row in weights.rows(config):
        fused = isinstance(row.place, Grouped)  # llama.cpp has queries first, then keys, then values, as we do
        for index, hf in enumerate(row.hf):
            name = names.get_name(hf, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise UserError(f"--format gguf: llama.cpp's {layout.architecture} has no place for the tensor {hf}")
            offset = layout.norm_offset if "norm" in name and name.endswith(".weight") else 0.0
            yield TensorPlace(name, row, None if fused else index, heads.get(name.split(".")[-2], 0), offset)


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Return the rows of a weight or bias in llama.cpp's order, in which the elements of a rotated pair are neighbors.

    In transformers' order they are half a head apart.
    """
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def uninterleave(tensor: Tensor, heads: int) -> Tensor:
    """Return the rows of a weight or bias in transformers' order; the inverse of `interleave`."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def rope_divisors(config: Config) -> Tensor:
    """Return what rotary scaling divides each frequency by, float32 (rope_n_elem / 2,)."""
    return rope_frequencies(replace(config, rope_scaling=None))[0] / rope_frequencies(config)[0]
