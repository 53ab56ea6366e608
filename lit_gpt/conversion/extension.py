"""Extends a checkpoint before it is finetuned: a longer context, and new tokens.

The context is stretched by linear interpolation of positions (Chen et al. 2023, arXiv 2306.15595): a position counts as
its `factor`-th part. New tokens begin as the mean of all others (Hewitt 2021), in the embedding and in the head.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor

from lit_gpt import files
from lit_gpt.checkpoints import folder as checkpoint
from lit_gpt.checkpoints import io
from lit_gpt.checkpoints.base_model import BaseCheckpoint, load_model
from lit_gpt.conversion import hf, logits, parity, readers
from lit_gpt.errors import UsageError, UserError
from lit_gpt.families.registry import config_from_hf
from lit_gpt.files import read_json
from lit_gpt.model.config import Config
from lit_gpt.model.rope import rope_frequencies
from lit_gpt.text import prompt_style
from lit_gpt.text.tokenizer import Tokenizer, find_tokenizer

ROWS = ("wte.weight", "lm_head.weight", "lm_head.bias")  # of these there is one for each token
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")  # the names that families have for the context


def extend(checkpoint_dir: Path, out_dir: Path, factor: float, tokens: Sequence[str]) -> Config:
    """Write a checkpoint folder with a longer context, more tokens, or both. Return its configuration.

    Args:
        factor: by which the context grows; 1: it stays.
        tokens: special tokens that the vocabulary lacks.

    Raises:
        UserError: the model has no positions that can be stretched or is quantized, or it has a token already.
    """
    checkpoint.refuse_quantized(checkpoint_dir)
    base = BaseCheckpoint.open(checkpoint_dir)
    with files.new_folder(out_dir) as folder:
        hf.copy_side_files(checkpoint_dir, folder, (*hf.CHECKPOINT_FILES, prompt_style.FILE))
        fields, known = read_json(folder / "config.json"), Tokenizer(folder).vocab_size if tokens else 0
        inner = fields.get("text_config", fields)
        ids = add_tokens(folder, tokens) if tokens else []
        rows = max([base.config.padded_vocab_size, *(i + 1 for i in ids)])
        if rows > base.config.padded_vocab_size:
            inner["vocab_size"] = rows
        if factor != 1:
            stretch(inner, base.config, factor)
            checkpoint.record_stretch(folder, factor)
        config = configured(base.config, read_json(checkpoint_dir / "config.json"), fields, factor, rows)
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        (folder / "lit_config.json").write_text(config.to_json())
        layout = {name: resized(name, tensor, rows) for name, tensor in base.state.items()}
        io.write_streamed(folder / "lit_model.pth", layout, extended(base.state, rows, known, ids))
        check(folder)
    return config


def stretch(fields: dict[str, Any], config: Config, factor: float) -> None:
    """Let the fields of a config.json say that the context is `factor` times as long, in place."""
    scaling = config.rope_scaling or {"rope_type": "linear", "factor": 1.0}
    if config.learned_positions or len(config.unrotated_layers) == config.n_layer or not config.rope_n_elem:
        raise UserError(f"--context_factor {factor:g}: {config.name} has no rotary positions, which can be stretched")
    if scaling["rope_type"] != "linear":
        raise UserError(
            f"--context_factor {factor:g}: {config.name} stretches its context already, by {scaling['rope_type']}"
        )
    said, parameters = {"rope_type": "linear", "factor": factor * scaling["factor"]}, fields.get("rope_parameters")
    if isinstance(parameters, dict):
        parameters.get("full_attention", parameters).update(said)
    else:
        fields["rope_scaling"] = said | {"type": "linear"}
    fields[next((name for name in LENGTHS if name in fields), LENGTHS[0])] = round(config.block_size * factor)


def configured(config: Config, before: Mapping[str, Any], after: Mapping[str, Any], factor: float, rows: int) -> Config:
    """Return a Config with what a config.json says differently now, held against what it was to say.

    Raises:
        UserError: the family reads something else from it.
    """
    was, now = (asdict(config_from_hf(dict(fields), name=config.name)) for fields in (before, after))
    new = replace(config, **{name: value for name, value in now.items() if value != was[name]})
    wanted = {"padded_vocab_size": rows, "block_size": round(config.block_size * factor)}
    frequencies = [rope_frequencies(c)[0] for c in (config, new)]
    said = all(getattr(new, name) == value for name, value in wanted.items())
    if not said or not torch.allclose(frequencies[0], frequencies[1] * factor):
        raise UserError(f"config.json of {config.name}: the family {config.family} cannot be extended so")
    return new


def add_tokens(folder: Path, tokens: Sequence[str]) -> list[int]:
    """Add special tokens to a folder's tokenizer, and return their ids.

    Raises:
        UsageError: a token is empty, named twice, or known already.
        UserError: the tokenizer does not find them in a text.
    """
    tokenizer, path = Tokenizer(folder), find_tokenizer(folder)
    for i, token in enumerate(tokens):
        if not token.strip() or token in tokens[:i] or tokenizer.token_id(token) is not None:
            why = "is in the vocabulary already" if token.strip() and token not in tokens[:i] else "is empty or double"
            raise UsageError(f"--add_tokens '{token}': {why}; expected new tokens, such as '<call>'")
    tokenizer._tokens.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    given = (tokenizer._tokens.token_to_id(token) for token in tokens)
    ids = [number for number in given if number is not None]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    entries = {i: {"content": token, **flags} for i, token in zip(ids, tokens, strict=True)}
    if path.suffix == ".json":
        contents = read_json(path)
        contents["added_tokens"] += [{"id": i, **entry} for i, entry in entries.items()]
        path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    state_tokens(folder, entries, stated_alone=path.suffix != ".json")
    found = [Tokenizer(folder).encode(f"a{token}b", bos=False).tolist() for token in tokens]
    if any(i not in encoded for i, encoded in zip(ids, found, strict=True)):
        raise UserError(f"{path}: does not find the new tokens in a text; add them with transformers instead")
    return ids


def state_tokens(folder: Path, entries: Mapping[int, dict[str, Any]], stated_alone: bool) -> None:
    """Let the settings of a tokenizer name its new tokens, where they name others or nothing else does."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path, missing_ok=True)
    if "added_tokens_decoder" in settings or stated_alone:
        settings.setdefault("added_tokens_decoder", {}).update({str(i): entry for i, entry in entries.items()})
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def resized(name: str, tensor: Tensor, rows: int) -> Tensor:
    """Return a tensor without contents of the shape that one of a base's has with so many tokens."""
    shape = (rows, *tensor.shape[1:]) if name in ROWS else tensor.shape
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


def extended(state: Mapping[str, Tensor], rows: int, known: int, ids: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a base with rows for new tokens, which are the mean of those of the `known` first."""
    for name, tensor in state.items():
        if name in ROWS and ids:
            mean = tensor[:known].float().mean(dim=0, keepdim=True).to(tensor.dtype)
            more = mean.expand(rows - len(tensor), *tensor.shape[1:])
            tensor = torch.cat([tensor, more])
            tensor[torch.tensor(ids)] = mean
        yield name, tensor


def check(folder: Path) -> None:
    """Refuse a folder whose logits are others by transformers, where that is installed."""
    what, model = "the extended checkpoint", load_model(folder)
    own = readers.LitReader.open(folder, model)
    reader = readers.read_back(what, ("transformers",), lambda: readers.read_lit(folder), lambda: own)
    parity.Reference.compute(own).compare(reader, what, *logits.rounding(model.dtype))
