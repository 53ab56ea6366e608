"""Read GGUF, the one-file format of llama.cpp: metadata, and tensors mapped from the file, K-quants among them.

The header is read by hand: gguf.GGUFReader loops past the file's end for as long as a damaged length says, does not
name the tensor whose type is unknown, and makes several arrays for each token of the vocabulary.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from torch import Tensor

from lit_gpt.errors import UserError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # for struct
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Stored:
    """The place of a tensor: `nbytes` from `start`, the last dimension of `shape` in blocks of `kind`."""

    shape: tuple[int, ...]
    kind: Kind
    start: int
    nbytes: int


class GGUFFile:
    """A GGUF file, mapped.

    Attributes:
        fields: its metadata.
        tensors: {name: where it lies}.

    Raises:
        UserError: it is not a whole GGUF file, or holds a type of tensor that cannot be dequantized.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file")
        with open(path, "rb") as file:
            if (magic := file.read(4)) != b"GGUF":
                raise UserError(f"{path}: not a GGUF file; it begins with {magic!r}, expected b'GGUF'")
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.at = 4
        try:
            version, n_tensors, n_fields = self._scalar("I"), self._scalar("Q"), self._scalar("Q")
            if version not in (2, 3):
                raise UserError(f"{path}: GGUF version {version}, expected 2 or 3 in little-endian order")
            self.fields: dict[str, Any] = {self._string(): self._value(self._scalar("I")) for _ in range(n_fields)}
            heads = [self._tensor_head() for _ in range(n_tensors)]
        except (struct.error, ValueError, KeyError, RecursionError) as error:
            raise UserError(f"{path}: damaged or truncated, its header ends in garbage ({error!r})") from None
        alignment = max(self.get("general.alignment", int, 32), 1)
        base = -(-self.at // alignment) * alignment
        self.tensors = {name: self._stored(name, shape, kind, base + offset) for name, shape, kind, offset in heads}

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Return a metadata value; floats as the shortest decimal that is the stored float32 (1e-05)."""
        if (value := self.fields.get(key)) is None:
            return default
        if not isinstance(value, (int, float) if kind is float else kind):
            raise UserError(f"{self.path}: the metadata {key} is of type {type(value).__name__}, not {kind.__name__}")
        return float(str(np.float32(self.fields[key]))) if kind is float else value

    def need(self, key: str, kind: type) -> Any:
        """Return a metadata value that the file must have; a number must be above 0."""
        value = self.get(key, kind)
        if value is None:
            raise UserError(f"{self.path}: lacks the metadata {key}")
        if kind in (int, float) and value <= 0:
            raise UserError(f"{self.path}: the metadata {key} is {value}, expected a number above 0")
        return value

    def need_list(self, key: str, kind: type) -> list:
        """Return a list that the metadata must have, all of whose values are of one type."""
        values = self.need(key, list)
        if not all(isinstance(value, kind) for value in values):
            raise UserError(f"{self.path}: the metadata {key} is not a list of {kind.__name__}")
        return values

    def read(self, name: str) -> Tensor:
        """Return a tensor, dequantized to float32."""
        stored = self.tensors[name]
        raw = np.frombuffer(self.data, np.uint8, stored.nbytes, stored.start).reshape(*stored.shape[:-1], -1)
        return torch.from_numpy(np.require(dequantize(raw, stored.kind), requirements="W"))

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        start = self.at + 8
        self.at = start + self._scalar("Q")
        if self.at > len(self.data):
            raise ValueError("a string runs past the end of the file")
        return self.data[start : self.at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            kind, length = self._scalar("I"), self._scalar("Q")
            return [self._value(kind) for _ in range(length)]
        return self._scalar(SCALARS[kind])

    def _tensor_head(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        sizes = [self._scalar("Q") for _ in range(self._scalar("I"))]
        return name, tuple(reversed(sizes)), self._scalar("I"), self._scalar("Q")

    def _stored(self, name: str, shape: tuple[int, ...], number: int, start: int) -> Stored:
        try:
            kind = Kind(number)
            block, size = GGML_QUANT_SIZES[kind]
            dequantize(np.zeros((1, size), np.uint8), kind)
        except (ValueError, NotImplementedError):
            known = Kind(number).name if number in list(Kind) else f"number {number}"
            raise UserError(f"{self.path}: the tensor {name} is of type {known}, which cannot be dequantized") from None
        nbytes = prod(shape) // block * size
        if not nbytes or shape[-1] % block:
            raise UserError(
                f"{self.path}: the tensor {name} {shape} does not divide into {kind.name} blocks of {block}"
            )
        if start + nbytes > len(self.data):
            raise UserError(f"{self.path}: truncated, the tensor {name} runs past its end; download it again")
        return Stored(shape, kind, start, nbytes)
