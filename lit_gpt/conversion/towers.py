"""A checkpoint whose language model is one of several towers: it alone is converted, finetuned and put back.

What is not of the language model, such as a tower that reads images, goes along in a file of its own, tensor by tensor
as it was, and back into an export.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from lit_gpt.checkpoints import io
from lit_gpt.conversion.hf_shards import LazyTensors

FILE = "lit_towers.safetensors"
# How names in such a file begin, by how they begin where the language model is alone. Files have been written with the
# language model as a whole in the outer model, and with its head taken out.
SPELLINGS = (
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    {"model.": "model.language_model.", "lm_head.": "lm_head."},
)


def spelling_of(stored: Iterable[str]) -> dict[str, str]:
    """Return which of the SPELLINGS a file's names have; that of a language model alone is empty."""
    names = list(stored)
    return next((s for s in SPELLINGS if any(name.startswith(s["model."]) for name in names)), {})


def language_model(stored: LazyTensors) -> LazyTensors:
    """Return the tensors of the language model, under their names where it is alone."""
    spelling = spelling_of(stored)
    return stored.renamed({alone: name for name in stored for alone in names_alone(name, spelling)})


def names_alone(name: str, spelling: Mapping[str, str]) -> list[str]:
    """Return a tensor's name where the language model is alone; none if it is of another tower."""
    if not spelling:
        return [name]
    return [new + name.removeprefix(old) for new, old in spelling.items() if name.startswith(old)]


def keep(checkpoint_dir: Path, stored: LazyTensors) -> None:
    """Write the tensors of the other towers, if there are any, into a checkpoint folder."""
    spelling = spelling_of(stored)
    others = {name: stored[name] for name in stored if not names_alone(name, spelling)}
    if others:
        io.save_safetensors(checkpoint_dir / FILE, others, spelling)
        print(f"{len(others)} tensors that are not of the language model are kept as they are, in {FILE}")


def whole(checkpoint_dir: Path, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a language model as its file spelled them, then those of the other towers."""
    if not (checkpoint_dir / FILE).is_file():
        yield from tensors
        return
    with safe_open(checkpoint_dir / FILE, framework="pt") as others:
        spelling = others.metadata()
        for name, tensor in tensors:
            yield next(old + name.removeprefix(new) for new, old in spelling.items() if name.startswith(new)), tensor
        for name in others.keys():
            yield name, others.get_tensor(name)
