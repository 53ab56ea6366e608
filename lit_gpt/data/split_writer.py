"""Keeps samples on disk as they are made, and writes the files of splits from them."""

import os
from array import array
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lit_gpt.checkpoints.io import save_safetensors_streamed


class SampleStore:
    """Keeps the samples of all rows in two temporary files, from which each split takes those that it wants.

    Args:
        folder: the place of the temporary files, until `remove`.
    """

    PARTS = {"tokens": np.int32, "supervised": np.uint8}
    LAYOUT = {"offsets": torch.int64, "tokens": torch.int32, "supervised": torch.uint8}  # the order in a split's file

    def __init__(self, folder: Path) -> None:
        self.paths = {name: folder / f"rows.{name}" for name in self.PARTS}
        self.files = {name: open(path, "w+b") for name, path in self.paths.items()}  # noqa: SIM115
        self.offsets = array("q", [0])

    def append(self, ids: list[int], supervised: list[bool]) -> None:
        """Add the sample of the next row; an empty one holds the place of a row that has none."""
        self.files["tokens"].write(np.asarray(ids, np.int32).tobytes())
        self.files["supervised"].write(bytes(supervised))
        self.offsets.append(self.offsets[-1] + len(ids))

    def lengths(self) -> np.ndarray:
        """Return the tokens of each row, int64 (rows,)."""
        return np.diff(np.array(self.offsets, np.int64))

    def read(self, name: str, row: int) -> bytes:
        """Return the bytes of a row's tokens or of its supervised flags."""
        size = np.dtype(self.PARTS[name]).itemsize
        begin, end = self.offsets[row], self.offsets[row + 1]
        return os.pread(self.files[name].fileno(), (end - begin) * size, begin * size)

    def sample(self, row: int) -> tuple[list[int], list[int]]:
        """Return the ids of a row and which of them are supervised."""
        self.flush()
        ids, supervised = (np.frombuffer(self.read(name, row), dtype).tolist() for name, dtype in self.PARTS.items())
        return ids, supervised

    def flush(self) -> None:
        """Let what was appended be read."""
        for file in self.files.values():
            file.flush()

    def write(self, path: Path, rows: np.ndarray) -> None:
        """Write a split's file, whole or not at all: the samples of `rows`, int64 (n,), in that order."""
        self.flush()
        offsets = np.concatenate(([0], self.lengths()[rows].cumsum())).astype(np.int64)
        sizes = {"offsets": len(offsets), "tokens": int(offsets[-1]), "supervised": int(offsets[-1])}
        layout = {name: torch.empty(sizes[name], dtype=dtype, device="meta") for name, dtype in self.LAYOUT.items()}
        contents = {
            "offsets": [offsets.tobytes()],
            **{name: map(partial(self.read, name), rows.tolist()) for name in self.PARTS},
        }
        save_safetensors_streamed(path, layout, contents)

    def remove(self) -> None:
        """Remove the temporary files."""
        for name, file in self.files.items():
            file.close()
            self.paths[name].unlink()
