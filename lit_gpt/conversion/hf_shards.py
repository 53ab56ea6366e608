"""Read and write Hugging Face weight shards, tensor by tensor."""

import json
import zipfile
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_gpt.checkpoints import io
from lit_gpt.errors import UserError
from lit_gpt.files import read_json

SHARD_BYTES = 2 * 10**9
INDEX = "model.safetensors.index.json"


class LazyTensors(Mapping[str, Tensor]):
    """Tensors that are read when asked for; which ones there are, and their dtypes, is known before."""

    places: Mapping[str, Any]  # {name: where the tensor is read from}

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor without reading it."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class StoredWeights(LazyTensors):
    """The tensors of a downloaded folder.

    Raises:
        UserError: no weights, a shard that the index names is missing, or a shard is damaged.
    """

    def __init__(self, checkpoint_dir: Path) -> None:
        self.places: dict[str, LazyTensors] = {}
        for path in shard_paths(Path(checkpoint_dir)):
            shard = SafetensorsShard(path) if path.suffix == ".safetensors" else BinShard(path)
            self.places.update(dict.fromkeys(shard, shard))

    def __getitem__(self, name: str) -> Tensor:
        return self.places[name][name]

    def dtype(self, name: str) -> torch.dtype:
        return self.places[name].dtype(name)


class Renamed(LazyTensors):
    """Stored tensors under other names: {new: stored}."""

    def __init__(self, stored: LazyTensors, names: dict[str, str]) -> None:
        self.stored, self.places = stored, names

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[self.places[name]]

    def dtype(self, name: str) -> torch.dtype:
        return self.stored.dtype(self.places[name])


def shard_paths(folder: Path) -> list[Path]:
    """Return the files that hold a folder's weights; of safetensors and .bin files the former."""
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


class SafetensorsShard(LazyTensors):
    def __init__(self, path: Path) -> None:
        try:
            self.file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error}); download it again") from None
        self.places = dict.fromkeys(self.file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.file.get_slice(name)[:0].dtype


class BinShard(LazyTensors):
    def __init__(self, path: Path) -> None:
        # files from before the zip format cannot be mapped
        self.places = io.load(path, mmap=zipfile.is_zipfile(path))

    def __getitem__(self, name: str) -> Tensor:
        return self.places[name]

    def dtype(self, name: str) -> torch.dtype:
        return self.places[name].dtype


def write_shards(out_dir: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write safetensors shards of up to `shard_bytes` (at least one tensor each), and an index if there are several."""
    parts: list[list[str]] = []  # the names in each shard written so far
    shard: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        contents = {name: tensor.contiguous() for name, tensor in shard.items()}
        io.save_safetensors(out_dir / f"part-{len(parts)}", contents, {"format": "pt"})
        parts.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        shard[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(parts) == 1:
        (out_dir / "part-0").replace(out_dir / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(parts):
        final = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        (out_dir / f"part-{i}").replace(out_dir / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out_dir / INDEX).write_text(json.dumps(index, indent=2) + "\n")
