"""The Hugging Face side of a checkpoint folder: shards of .safetensors or .bin, read and written tensor by tensor."""

import json
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_gpt import checkpoint, weights
from lit_gpt.config import Config
from lit_gpt.errors import UserError
from lit_gpt.files import atomic
from lit_gpt.tokenizer import CHAT_TEMPLATE_DIR

SHARD_BYTES = 2 * 10**9
INDEX = "model.safetensors.index.json"
# What a checkpoint folder carries along unchanged.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "vocab.json", "merges.txt",
)  # fmt: skip
SIDE_FILES = (*TOKENIZER_FILES, "generation_config.json", "config.json")


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of a downloaded folder, each read when asked for.

    Raises:
        UserError: no weights, a shard that the index names is missing, or a shard is damaged.
    """

    def __init__(self, checkpoint_dir: Path) -> None:
        self.shards = {}  # name: the open shard that holds it
        for path in shard_paths(Path(checkpoint_dir)):
            shard = SafetensorsShard(path) if path.suffix == ".safetensors" else BinShard(path)
            self.shards.update(dict.fromkeys(shard.names, shard))

    def __getitem__(self, name: str) -> Tensor:
        return self.shards[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)

    def dtype(self, name: str) -> torch.dtype:
        return self.shards[name].dtype(name)


class Renamed(Mapping[str, Tensor]):
    """Stored tensors under other names: {new: stored}."""

    def __init__(self, stored: Mapping[str, Tensor], names: dict[str, str]) -> None:
        self.stored, self.names = stored, names

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def dtype(self, name: str) -> torch.dtype:
        return self.stored.dtype(self.names[name])


def shard_paths(folder: Path) -> list[Path]:
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{index}: expected a weight_map that names the shards; download it again")
            paths = [folder / name for name in sorted(set(weight_map.values()))]
        elif (folder / (stem + suffix)).is_file():
            paths = [folder / (stem + suffix)]
        else:
            continue
        for path in paths:
            if not path.is_file():
                raise UserError(f"{path}: named by {index.name} but missing; download it again")
        return paths
    raise UserError(
        f"{folder}: no weights; expected model.safetensors, pytorch_model.bin or their shards with an index, as "
        "`python scripts/download.py` leaves them"
    )


class SafetensorsShard:
    def __init__(self, path: Path) -> None:
        try:
            self.file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error}); download it again") from None
        self.names = list(self.file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.file.get_slice(name)[:0].dtype


class BinShard:
    def __init__(self, path: Path) -> None:
        # files from before the zip format cannot be mapped
        self.tensors = checkpoint.load(path, mmap=zipfile.is_zipfile(path))
        self.names = list(self.tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype


def convert(checkpoint_dir: Path, hf: StoredWeights, dtype: torch.dtype | None = None) -> Config:
    """Write `lit_model.pth` and `lit_config.json` into a folder that has a config.json.

    Args:
        hf: tensors under their Hugging Face names, with `.dtype(name)`; read one by one.
        dtype: to store; None: each tensor as it is.

    Raises:
        UserError: what config.json, the family's table and the tensors do not agree on. Nothing is written then.
    """
    folder = Path(checkpoint_dir)
    config = Config.from_hf(read_json(folder / "config.json"), name=folder.name)
    hf = Renamed(hf, weights.full_names(config, hf))
    config = weights.as_stored(config, hf)
    weights.check_names(config, set(hf))
    layout = {
        row.lit: torch.empty(row.shape, dtype=dtype or widest([hf.dtype(name) for name in row.hf]), device="meta")
        for row in weights.rows(config)
    }
    checkpoint.write_streamed(folder / "lit_model.pth", layout, in_range(layout, weights.to_lit(config, hf)))
    with atomic(folder / "lit_config.json") as temporary:
        temporary.write_text(config.to_json())
    return config


def in_range(layout: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Pass tensors on that their dtype in the layout can hold; float16 ends at 65504."""
    for name, tensor in tensors:
        if layout[name].dtype == torch.float16 != tensor.dtype and tensor.abs().max() > torch.finfo(torch.float16).max:
            raise UserError(f"{name}: holds values beyond float16; convert with --dtype bf16")
        yield name, tensor


def widest(dtypes: list[torch.dtype]) -> torch.dtype:
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError if the file is missing or is not a JSON object."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(contents, dict):
        raise UserError(f"{path}: expected a JSON object")
    return contents


def export(checkpoint_dir: Path, out_dir: Path, lit: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads unedited.

    Args:
        checkpoint_dir: converted checkpoint whose configuration and side files go along.
        lit: its state dict, or one of the same architecture.
    """
    config = Config.from_checkpoint(checkpoint_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    copy_side_files(checkpoint_dir, out_dir)
    hf_config = read_json(Path(checkpoint_dir) / "config.json")
    hf_config |= {"tie_word_embeddings": config.tie_embeddings, "dtype": str(lit["wte.weight"].dtype).split(".")[1]}
    hf_config.pop("torch_dtype", None)
    hf_config.pop("auto_map", None)  # points to code that is not here; transformers knows the architecture itself
    (out_dir / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
    write_shards(out_dir, weights.to_hf(config, lit), shard_bytes)


def copy_side_files(source: Path, target: Path, names: tuple[str, ...] = SIDE_FILES) -> None:
    for name in names:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)
    if (Path(source) / CHAT_TEMPLATE_DIR).is_dir():
        shutil.copytree(Path(source) / CHAT_TEMPLATE_DIR, Path(target) / CHAT_TEMPLATE_DIR, dirs_exist_ok=True)


def write_shards(out_dir: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Safetensors shards of up to `shard_bytes` (at least one tensor each), with an index if there are several."""
    names, shard, size, total = {}, {}, 0, 0

    def flush() -> None:
        path = out_dir / f"part-{len(set(names.values())):05d}"
        names.update(dict.fromkeys(shard, path))
        checkpoint.save_safetensors(path, {k: t.contiguous() for k, t in shard.items()}, {"format": "pt"})
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        shard[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    parts = sorted(set(names.values()))
    final = {part: f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i, part in enumerate(parts, 1)}
    if len(parts) == 1:
        final = {parts[0]: "model.safetensors"}
    for part, name in final.items():
        part.replace(out_dir / name)
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {k: final[part] for k, part in names.items()}}
        (out_dir / INDEX).write_text(json.dumps(index, indent=2) + "\n")
