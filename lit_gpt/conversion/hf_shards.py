"""Read and write Hugging Face weight shards, tensor by tensor."""

import json
import zipfile
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_gpt.checkpoints import io
from lit_gpt.errors import UserError
from lit_gpt.files import read_json
from lit_gpt.quantization import fp8, mxfp4

SHARD_BYTES = 2 * 10**9
INDEX = "model.safetensors.index.json"
BLOCKS, SCALES = "_blocks", "_scales"  # of a tensor in MXFP4
INVERSE = "_scale_inv"  # the factors of a tensor in FP8
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
ACTIVATION_SCALES = (".activation_scale", ".input_scale")  # which bear on products in FP8 alone
# Sets of weights that a folder may hold, in the order in which transformers looks for them.
SETS = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
OTHER_SETS = ("tf_model.h5", "flax_model.msgpack", "consolidated.safetensors", "adapter_model.safetensors")


class LazyTensors(Mapping[str, Tensor]):
    """Tensors that are read when asked for; which ones there are, and their dtypes, is known before."""

    places: dict[str, Any]  # {name: where the tensor is read from}

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor without reading it."""

    def renamed(self, names: Mapping[str, str]) -> Self:
        """Return these tensors under other names: {new: old}."""
        result = copy(self)
        result.places = {new: self.places[old] for new, old in names.items()}
        return result

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
        self.places = {}
        index, paths = shard_paths(Path(checkpoint_dir))
        for path in paths:
            shard = open_shard(path)
            self.places.update({name: (shard, name) for name in shard.keys()})
        if index:
            say_differences(index, set(self.places))

    def __getitem__(self, name: str) -> Tensor:
        shard, stored = self.places[name]
        return shard[stored] if isinstance(shard, dict) else shard.get_tensor(stored)

    def dtype(self, name: str) -> torch.dtype:
        shard, stored = self.places[name]
        if isinstance(shard, dict):
            return shard[stored].dtype
        part = shard.get_slice(stored)
        return (part[:0] if part.get_shape() else self[name]).dtype  # a single number cannot be cut


class Dequantized(LazyTensors):
    """Stored tensors, those in MXFP4 or FP8 as one bfloat16 tensor each, under the name that it has unquantized.

    Args:
        block: rows and columns that share a factor in FP8.

    Raises:
        UserError: codes lack their factors, or codes and factors have shapes that do not fit together.
    """

    def __init__(self, stored: LazyTensors, block: tuple[int, int] = (128, 128)) -> None:
        self.stored, self.block = stored, block
        self.places = {name: (name, "") for name in stored if not name.endswith(ACTIVATION_SCALES)}
        for codes, scales in ((BLOCKS, SCALES), ("", INVERSE)):
            for name in [name.removesuffix(scales) for name in stored if name.endswith(scales)]:
                if name + codes in stored:
                    del self.places[name + scales], self.places[name + codes]
                    self.places[name] = (name, scales)
        self.refuse_codes_alone()

    def refuse_codes_alone(self) -> None:
        """Refuse codes whose factors no shard holds, and factors of MXFP4 without codes."""
        for name, (_, scales) in self.places.items():
            if name.endswith(BLOCKS):
                lacks = name.removesuffix(BLOCKS) + SCALES
            elif name.endswith(SCALES):
                lacks = name.removesuffix(SCALES) + BLOCKS
            elif not scales and self.stored.dtype(name) in FP8:
                lacks = name + INVERSE
            else:
                continue
            kind = str(self.stored.dtype(name)).removeprefix("torch.")
            raise UserError(
                f"{name}: is one part of a quantized tensor, in {kind}, but no shard holds {lacks}; download the model "
                "again, or take one in full precision"
            )

    def __getitem__(self, name: str) -> Tensor:
        stored, scales = self.places[name]
        if not scales:
            return self.stored[stored]
        codes, factors = self.stored[stored + (BLOCKS if scales == SCALES else "")], self.stored[stored + scales]
        try:
            if scales == SCALES:
                return mxfp4.dequantize(codes, factors).mT
            return fp8.dequantize(codes, factors, self.block)
        except ValueError:
            blocks = "; download it again"
            if scales == INVERSE:
                blocks = f" in blocks of {self.block}; does config.json name another weight_block_size?"
            shapes = f"{tuple(codes.shape)} has no factors {tuple(factors.shape)}"
            raise UserError(f"{stored}: {shapes}{blocks}") from None

    def dtype(self, name: str) -> torch.dtype:
        stored, scales = self.places[name]
        return torch.bfloat16 if scales else self.stored.dtype(stored)


def shard_paths(folder: Path) -> tuple[Path | None, list[Path]]:
    """Return the index, if there is one, and the files that hold a folder's weights.

    Of several sets it is the one that transformers loads, which is said.

    Raises:
        UserError: there are none, or a shard that the index names is missing.
    """
    there = [name for name in (*SETS, *OTHER_SETS) if (folder / name).is_file()]
    chosen = next((name for name in there if name in SETS), None)
    if chosen is None:
        found = f", found {', '.join(there)}, which are not read" if there else ""
        raise UserError(
            f"{folder}: no weights{found}; expected model.safetensors, pytorch_model.bin or their shards with an "
            "index, as `python scripts/download.py` leaves them"
        )
    if others := [name for name in there if name != chosen and name in SETS]:
        print(f"{folder}: takes {chosen}, as transformers does, and leaves {', '.join(others)}")
    index = folder / chosen
    if index.suffix != ".json":
        return None, [index]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: expected a weight_map that names the shards; download it again")
    paths = [folder / name for name in sorted(set(weight_map.values()))]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: named by {index.name} but missing; download it again")
    return index, paths


def say_differences(index: Path, stored: set[str]) -> None:
    """Say which tensors an index names that its shards do not hold, and which they hold besides; the shards count."""
    named = read_json(index)["weight_map"].keys()
    for what, names in (
        ("names tensors that its shards do not hold", named - stored),
        ("does not name tensors that its shards hold, which are read", stored - named),
    ):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            print(f"{index}: {what}: {', '.join(sorted(names)[:5])}{more}")


def open_shard(path: Path) -> Any:
    """Open a shard: a dictionary of mapped tensors, or for safetensors what reads one when asked for."""
    if path.suffix != ".safetensors":
        return io.load(path, mmap=zipfile.is_zipfile(path))  # files from before the zip format cannot be mapped
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); download it again") from None


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
