"""A family's weight table, run in both directions: Hugging Face to lit, and back.

A table maps each module of the GPT to the place of its tensors in the Hugging Face file, either one name or one of the
layouts of lit_gpt.families.tables; "{}" stands for the layer, and a layer that differs has entries of its own. What the
table does not name is an error, never skipped.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch

import torch
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.families.registry import family_of_config
from lit_gpt.families.tables import Place, Table
from lit_gpt.model.config import Config
from lit_gpt.model.gpt import GPT

ROTARY = "*.rotary_emb.inv_freq"  # rotary frequencies, which old files of all families hold and no model reads


@dataclass(frozen=True)
class TensorRow:
    """A lit tensor and where it lies in the Hugging Face file."""

    lit: str
    shape: torch.Size
    hf: tuple[str, ...]
    place: Place


def rows(config: Config) -> Iterator[TensorRow]:
    """Yield the table written out: one row for each tensor of the GPT's state dict."""
    table = family_of_config(config).weights(config)
    with torch.device("meta"):
        state = GPT(config).state_dict()
    for name, tensor in state.items():
        if config.tie_embeddings and name == "lm_head.weight":
            continue  # the embedding
        place = entry(table, name)
        if place is None:
            raise KeyError(f"the weight table of {config.family} has no place for {name}")
        yield row_of(name, tensor.shape, place)


def entry(table: Table, name: str) -> Place | None:
    """Return the place that a table has for a tensor of the GPT's state dict, by its own name or its module's."""
    for key in (name, name.rpartition(".")[0]):
        if place := table.get(key) or table.get(f"h.{{}}.{key.split('.', 2)[-1]}"):
            return Place((place,)) if isinstance(place, str) else place
    return None


def row_of(name: str, shape: torch.Size, place: Place) -> TensorRow:
    """Return the row of a tensor of the GPT's state dict."""
    module, _, kind = name.rpartition(".")  # kind: weight or bias
    layer = module.split(".")[1] if module.startswith("h.") else ""
    return TensorRow(name, shape, tuple(place.name(hf.format(layer), kind) for hf in place.modules), place)


def check_names(config: Config, stored: set[str]) -> None:
    """Refuse a Hugging Face file that lacks a tensor or holds one that the table does not name.

    Raises:
        UserError: lists them.
    """
    family = family_of_config(config)
    derived = (ROTARY, *getattr(family, "DERIVED", ()), *getattr(family, "LEFT_OUT", {}))
    named = {hf for row in rows(config) for hf in row.hf}
    missing = sorted(named - stored)
    own_head = {head(config)} if config.tie_embeddings else set()  # equal to the embedding, see `as_stored`
    others = stored - named - own_head
    leftover = sorted(name for name in others if not any(fnmatch(name, pattern) for pattern in derived))
    if missing:
        raise UserError(f"the weights lack {len(missing)} tensors that config.json calls for: {_some(missing)}")
    if leftover:
        raise UserError(
            f"the weights hold {len(leftover)} tensors that the {config.family} family does not name: {_some(leftover)}"
        )


def left_out(config: Config, stored: Iterable[str]) -> Iterator[str]:
    """Yield a line for each part of a Hugging Face file that is not of the model here."""
    named = {hf for row in rows(config) for hf in row.hf}
    for pattern, what in getattr(family_of_config(config), "LEFT_OUT", {}).items():
        if n := sum(fnmatch(name, pattern) for name in stored if name not in named):
            yield f"{n} tensors of {what} are left out"


def as_stored(config: Config, hf: Mapping[str, Tensor]) -> Config:
    """Return the Config with head and embedding apart if the file holds both, though config.json ties them.

    A head that equals the embedding stays tied, as transformers has it, unless the family has `HEAD_APART`. One that
    differs is not lost; transformers 5 does not tie it then either.
    """
    if not config.tie_embeddings or head(config) not in hf:
        return config
    embedding = next(row.hf[0] for row in rows(config) if row.lit == "wte.weight")
    apart = getattr(family_of_config(config), "HEAD_APART", False)
    equal = embedding in hf and torch.equal(hf[embedding], hf[head(config)])
    return config if equal and not apart else replace(config, tie_embeddings=False)


def head(config: Config) -> str:
    """Return the name of the head's weight in a Hugging Face file, whether it is tied or not."""
    untied = rows(replace(config, tie_embeddings=False))
    return next(row.hf[0] for row in untied if row.lit == "lm_head.weight")


def full_names(config: Config, stored: Iterable[str]) -> dict[str, str]:
    """Return {name in the table: name in the file}.

    A file that was saved from a model without its head, such as those of GPT-2, leaves out the first part of the names.
    """
    named = [hf for row in rows(config) for hf in row.hf]
    prefix = named[0].split(".")[0] + "."  # the embedding's
    if any(name.startswith(prefix) for name in stored):
        prefix = ""
    return {name if name in named else prefix + name: name for name in stored}


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def to_lit(
    table: Iterable[TensorRow], stored: Mapping[str, Tensor], settings: str = "config.json"
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of the GPT's state dict, read one by one.

    Args:
        table: the rows of `rows`, or of another file's format.
        settings: what the shapes are implied by.

    Raises:
        UserError: a tensor's shape is not what the settings imply.
    """
    for row in table:
        tensors = [stored[name] for name in row.hf]
        try:
            tensor = row.place.to_lit(tensors)
            matches = tensor.shape == row.shape
        except RuntimeError:  # rows that do not divide into heads
            matches = False
        if not matches:
            shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in zip(row.hf, tensors, strict=True))
            raise UserError(f"{settings} contradicts the tensors: {shapes} cannot make {row.lit} {tuple(row.shape)}")
        yield row.lit, tensor


def to_hf(table: Iterable[TensorRow], lit: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor in the file's layout, one by one; the inverse of `to_lit`."""
    for row in table:
        yield from zip(row.hf, row.place.to_hf(lit[row.lit]), strict=True)
