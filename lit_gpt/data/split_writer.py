"""Writes the samples of one split to its file."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lit_gpt.checkpoints.io import save_safetensors_streamed
from lit_gpt.data.audit import Audit


class SplitWriter:
    """Takes the samples of one split as they are made, and makes its file of them.

    Args:
        path: of the file to be; what comes before lies beside it.
    """

    PARTS = {"offsets": torch.int64, "tokens": torch.int32, "supervised": torch.uint8}  # the order in the file

    def __init__(self, path: Path) -> None:
        self.path, self.audit = path, Audit()
        self.paths = {name: path.with_suffix(f".{name}") for name in self.PARTS}
        self.files = {name: open(part, "wb") for name, part in self.paths.items()}  # noqa: SIM115
        self.first: tuple[list[int], list[bool]] | None = None
        self.rows = self.tokens = 0
        self.files["offsets"].write(bytes(8))

    def append(self, ids: list[int], supervised: list[bool], times: int = 1) -> None:
        """Add a sample, `times` times over."""
        self.first = self.first or (ids, supervised)
        self.files["tokens"].write(np.asarray(ids, np.int32).tobytes() * times)
        self.files["supervised"].write(bytes(supervised) * times)
        for _ in range(times):
            self.rows, self.tokens = self.rows + 1, self.tokens + len(ids)
            self.files["offsets"].write(self.tokens.to_bytes(8, "little"))
        self.audit.lengths[len(ids)] += times
        self.audit.supervised += sum(supervised[1:]) * times

    def finish(self, seed: int | None = None) -> None:
        """Write the file, whole or not at all; with `seed` the samples in a random order."""
        for file in self.files.values():
            file.close()
        sizes = {"offsets": self.rows + 1, "tokens": self.tokens, "supervised": self.tokens}
        layout = {name: torch.empty(sizes[name], dtype=dtype, device="meta") for name, dtype in self.PARTS.items()}
        contents = {name: blocks(path) for name, path in self.paths.items()}
        if seed is not None and self.tokens:
            contents = self.shuffled(
                torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed % 2**63)).tolist()
            )
        save_safetensors_streamed(self.path, layout, contents)
        for path in self.paths.values():
            path.unlink()

    def shuffled(self, order: list[int]) -> dict[str, Iterable[bytes]]:
        offsets = np.fromfile(self.paths["offsets"], np.int64)
        spans = [slice(offsets[i], offsets[i + 1]) for i in order]
        tokens = np.memmap(self.paths["tokens"], np.int32, "r")
        supervised = np.memmap(self.paths["supervised"], np.uint8, "r")
        moved = np.concatenate(([0], np.diff(offsets)[order].cumsum()))
        return {
            "offsets": [moved.astype(np.int64).tobytes()],
            "tokens": (tokens[span].tobytes() for span in spans),
            "supervised": (supervised[span].tobytes() for span in spans),
        }


def blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from iter(partial(file.read, 1 << 20), b"")
