"""Convert GGUF files, the one-file format of llama.cpp, to checkpoint folders, as if downloaded and converted.

Metadata becomes config.json and the tokenizer's files; tensors are dequantized one by one. What the file says and this
project does not know is refused, not guessed.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt import files
from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.conversion import hf, weights
from lit_gpt.conversion.gguf.layout import ROPE_FACTORS, layout_of, rows
from lit_gpt.conversion.gguf.metadata import check_metadata, family_of, hf_config
from lit_gpt.conversion.gguf.reader import GGUFFile
from lit_gpt.conversion.gguf.tokenizer import Vocabulary, build_tokenizer, tokenizer_config
from lit_gpt.conversion.hf_shards import LazyTensors
from lit_gpt.errors import UserError
from lit_gpt.families.registry import config_from_hf
from lit_gpt.model.config import Config


def convert(gguf_path: Path, checkpoint_dir: Path, dtype: torch.dtype, quantize: str | None = None) -> Config:
    """Write a converted checkpoint folder, whole or not at all.

    Args:
        quantize: one of our formats to keep the weights in, rounded to the nearest.

    Raises:
        UserError: the file is damaged, or holds what cannot be taken over; or the folder holds something.
    """
    with files.new_folder(checkpoint_dir) as folder:
        file = GGUFFile(gguf_path)
        family_of(file)
        tokens = Vocabulary(file)
        fields = hf_config(file, tokens, dtype)
        config = config_from_hf(fields, name=checkpoint_dir.resolve().name)
        write_json(folder / "config.json", fields)
        write_tokenizer(folder, file, tokens)
        hf.write(folder, config, table_of(file, config), GGUFWeights(file, dtype), dtype, f"{gguf_path}: its metadata")
        if quantize:
            base = BaseCheckpoint.open(folder, quantize)  # maps the file that is replaced
            base.write_quantized(folder, base.quantized(base.dtype), own_codes=False)
    return config


def write_tokenizer(folder: Path, file: GGUFFile, tokens: Vocabulary) -> None:
    """Write the files of the tokenizer, the chat template and the end tokens."""
    write_json(folder / "generation_config.json", generation_config(file, tokens))
    write_json(folder / "tokenizer_config.json", tokenizer_config(file, tokens))
    build_tokenizer(file, tokens).save(str(folder / "tokenizer.json"))
    if template := file.get("tokenizer.chat_template", str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_json(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class GGUFWeights(LazyTensors):
    """The tensors of a file, each dequantized to `dtype`.

    Raises:
        UserError: a tensor's values do not fit `dtype`.
    """

    def __init__(self, file: GGUFFile, dtype: torch.dtype) -> None:
        self.file, self._dtype = file, dtype
        self.places = {name: name for name in file.tensors}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.file.read(name)
        least, most = tensor.aminmax()
        if not (torch.finfo(self._dtype).min <= least and most <= torch.finfo(self._dtype).max):  # nan is neither
            raise UserError(f"{self.file.path}: the tensor {name} holds values not finite as {self._dtype}")
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype


def table_of(file: GGUFFile, config: Config) -> list[weights.TensorRow]:
    """Return where the tensors of a file's model lie.

    Raises:
        UserError: llama.cpp has no such model, the metadata says something else, or there are other tensors.
    """
    try:
        layout = layout_of(config)
        table = list(rows(config, layout))
    except UserError as error:
        raise UserError(f"{file.path}: {str(error).removeprefix('--format gguf: ')}") from None
    check_metadata(file, config, layout)
    named = {name for row in table for name in row.hf}
    if unknown := sorted(file.tensors.keys() - named - {ROPE_FACTORS}):
        raise UserError(
            f"{file.path}: the tensor {unknown[0]} is not part of a {config.family} model of "
            f"{config.n_layer} layers as known here"
        )
    if missing := sorted(named - file.tensors.keys()):
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(f"{file.path}: lacks {len(missing)} tensors of such a model: {', '.join(missing[:5])}{more}")
    return table


def generation_config(file: GGUFFile, tokens: Vocabulary) -> dict[str, Any]:
    """Return the contents of generation_config.json: the end tokens of a text, a turn and a message all stop."""
    stops = [tokens.named["eos_token"], *(file.get(f"tokenizer.ggml.{x}_token_id", int) for x in ("eot", "eom"))]
    stops = list(dict.fromkeys(stop for stop in stops if stop is not None))
    return {
        "bos_token_id": tokens.named["bos_token"],
        "eos_token_id": stops if len(stops) > 1 else (stops or [None])[0],
    }
