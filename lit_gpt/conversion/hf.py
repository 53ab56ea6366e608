"""The Hugging Face side of a checkpoint folder: shards of .safetensors or .bin, read and written tensor by tensor."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.checkpoints import io
from lit_gpt.checkpoints.folder import STRETCH
from lit_gpt.conversion import towers, weights
from lit_gpt.conversion.hf_shards import SHARD_BYTES, Dequantized, LazyTensors, write_shards
from lit_gpt.errors import UserError
from lit_gpt.families.registry import config_from_hf
from lit_gpt.files import atomic, read_json
from lit_gpt.model.config import Config
from lit_gpt.text.tokenizer import CHAT_TEMPLATE_DIR

# What a checkpoint folder carries along unchanged.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt",
)  # fmt: skip
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIDE_FILES = (
    *TOKENIZER_FILES, "generation_config.json", "config.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
CHECKPOINT_FILES = (*SIDE_FILES, towers.FILE, STRETCH)  # what one of our folders besides carries along


def convert(checkpoint_dir: Path, hf: LazyTensors, dtype: torch.dtype | None = None) -> Config:
    """Write `lit_model.pth` and `lit_config.json` into a folder that has a config.json.

    Args:
        hf: tensors under their Hugging Face names; read one by one.
        dtype: in which to store them; None: each tensor as it is.

    Raises:
        UserError: what config.json, the family's table and the tensors do not agree on. Nothing is written then.
    """
    fields = read_json(checkpoint_dir / "config.json")
    settings = fields.get("quantization_config")
    refuse_quantized(settings)
    config = config_from_hf(fields, name=checkpoint_dir.name)
    block = (settings or {}).get("weight_block_size") or (128, 128)
    stored = Dequantized(hf, tuple(block))
    hf = towers.language_model(stored)
    hf = hf.renamed(weights.full_names(config, hf))
    config = weights.as_stored(config, hf)
    weights.check_names(config, set(hf))
    for line in weights.left_out(config, hf):
        print(line)
    write(checkpoint_dir, config, list(weights.rows(config)), hf, dtype)
    towers.keep(checkpoint_dir, stored)
    return config


def write(
    folder: Path,
    config: Config,
    table: list[weights.TensorRow],
    stored: LazyTensors,
    dtype: torch.dtype | None,
    settings: str = "config.json",
) -> None:
    """Write `lit_model.pth` and `lit_config.json` from tensors that lie in a file as the table says.

    Raises:
        UserError: the tensors are codes, of other shapes than the Config implies, or have values beyond the dtype.
    """
    layout = {}
    for row in table:
        check_dtypes(row.hf, stored)
        widest = dtype or reduce(torch.promote_types, (stored.dtype(name) for name in row.hf))
        layout[row.lit] = torch.empty(row.shape, dtype=widest, device="meta")
    io.write_streamed(folder / "lit_model.pth", layout, in_range(layout, weights.to_lit(table, stored, settings)))
    with atomic(folder / "lit_config.json") as temporary:
        temporary.write_text(config.to_json())


def refuse_quantized(settings: Any) -> None:
    """Refuse the weights of a config.json that says how they are quantized, but for MXFP4 and FP8. Raises UserError."""
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if settings and method not in ("mxfp4", "fp8"):
        raise UserError(
            f"config.json: 'quantization_config': the weights are quantized ({method or 'no method named'}), which is "
            "not read; download the model in full precision, and quantize it here by --quantize"
        )


def check_dtypes(names: Iterable[str], hf: LazyTensors) -> None:
    """Refuse tensors that hold codes of a quantized model and not weights. Raises UserError."""
    for name in names:
        if (dtype := hf.dtype(name)) not in WEIGHT_DTYPES:
            raise UserError(
                f"{name}: is {str(dtype).removeprefix('torch.')}, which weights are not stored in; is the model "
                "quantized? Download it in full precision"
            )


def in_range(layout: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors; raise UserError for one that its dtype in the layout cannot hold: float16 ends at 65504."""
    for name, tensor in tensors:
        if layout[name].dtype == torch.float16 != tensor.dtype and tensor.abs().max() > torch.finfo(torch.float16).max:
            raise UserError(f"{name}: holds values beyond float16; convert with --dtype bf16")
        yield name, tensor


def export(checkpoint_dir: Path, out_dir: Path, lit: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads unedited.

    Args:
        checkpoint_dir: converted checkpoint whose configuration and side files go along.
        lit: the state dict to write: the checkpoint's, or one of the same architecture.
    """
    config = Config.from_checkpoint(checkpoint_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    copy_side_files(checkpoint_dir, out_dir, SIDE_FILES)
    hf_config = read_json(checkpoint_dir / "config.json")
    said = {"tie_word_embeddings": config.tie_embeddings, "dtype": str(lit["wte.weight"].dtype).split(".")[1]}
    hf_config |= said
    if "text_config" in hf_config:
        hf_config["text_config"] |= said
    hf_config.pop("torch_dtype", None)
    hf_config.pop("quantization_config", None)  # of the downloaded files
    hf_config.pop("auto_map", None)  # points to code that is not here; transformers knows the architecture itself
    (out_dir / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
    write_shards(out_dir, towers.whole(checkpoint_dir, weights.to_hf(weights.rows(config), lit)), shard_bytes)


class Cast(Mapping[str, Tensor]):
    """Tensors in another dtype, into which each is cast when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.tensors, self.layout = tensors, {name: t.to("meta", dtype) for name, t in tensors.items()}
        self.dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        ((_, tensor),) = in_range(self.layout, [(name, self.tensors[name])])
        return tensor.to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def copy_side_files(source: Path, target: Path, names: tuple[str, ...] = CHECKPOINT_FILES) -> None:
    """Copy those of the named files that a folder has, and its folder of chat templates."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / CHAT_TEMPLATE_DIR).is_dir():
        shutil.copytree(source / CHAT_TEMPLATE_DIR, target / CHAT_TEMPLATE_DIR, dirs_exist_ok=True)
