"""Reads and writes Hugging Face weight shards, tensor by tensor."""

import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_gpt.checkpoints import io
from lit_gpt.errors import UserError
from lit_gpt.files import read_json

SHARD_BYTES = 2 * 10**9
INDEX = "model.safetensors.index.json"


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
        self.tensors = io.load(path, mmap=zipfile.is_zipfile(path))
        self.names = list(self.tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype


def write_shards(out_dir: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Safetensors shards of up to `shard_bytes` (at least one tensor each), with an index if there are several."""
    names, shard, size, total = {}, {}, 0, 0

    def flush() -> None:
        path = out_dir / f"part-{len(set(names.values())):05d}"
        names.update(dict.fromkeys(shard, path))
        io.save_safetensors(path, {k: t.contiguous() for k, t in shard.items()}, {"format": "pt"})
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
