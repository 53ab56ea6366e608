"""What the layers keep of the tokens seen so far, for one sequence, a batch that decodes, or packed prompts: attention
keys and values, a recurrence its state."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from lit_gpt.kernels.policy import policy


class LayerCache(ABC):
    """Holds what one layer keeps of the tokens seen so far."""

    def __init__(self) -> None:
        self.length = 0
        self.uses_long_rope = False  # whether keys are rotated as those of a long sequence; see GPT.needs_reread

    @property
    @abstractmethod
    def rows(self) -> int:
        """Return how many sequences it has room for."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Return how many bytes its tensors take."""

    @property
    def keys_values(self) -> tuple[Tensor, ...]:
        """Return its keys and values, (B, n_query_groups, max_length, size of each), if there are such."""
        return ()

    @abstractmethod
    def row(self, i: int) -> "LayerCache":
        """Return an empty cache of one sequence, in the memory of a row."""

    @abstractmethod
    def copy_from(self, other: "LayerCache") -> None:
        """Take over what is in another cache with as much room."""
        self.length, self.uses_long_rope = other.length, other.uses_long_rope

    @abstractmethod
    def can_return_to(self, length: int) -> bool:
        """Return whether the tokens after the first `length` can be dropped."""

    def drop_after(self, length: int) -> None:
        """Drop all but the first `length` tokens."""
        self.length = min(self.length, length)

    @abstractmethod
    def decoding(self, rows: int, positions: Tensor, lengths: tuple[int, ...]) -> "AnyDecodeCache":
        """Return the first rows as a cache to which each adds a token at its own position; see DecodeCache."""


class AttentionCache(LayerCache):
    """Holds the keys and values of one layer for the tokens seen so far, or a key that all heads share, and latents."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        super().__init__()
        self.k, self.v = k, v  # (B, n_query_groups, max_length, size of each)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens, return those of all."""
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]

    @property
    def keys_values(self) -> tuple[Tensor, ...]:
        return self.k, self.v

    @property
    def rows(self) -> int:
        return len(self.k)

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def row(self, i: int) -> "AttentionCache":
        return AttentionCache(self.k[i : i + 1], self.v[i : i + 1])

    def copy_from(self, other: LayerCache) -> None:
        assert isinstance(other, AttentionCache)
        super().copy_from(other)
        for mine, theirs in ((self.k, other.k), (self.v, other.v)):
            mine[:, :, : self.length] = theirs[:, :, : self.length]

    def can_return_to(self, length: int) -> bool:
        return True

    def decoding(self, rows: int, positions: Tensor, lengths: tuple[int, ...]) -> "DecodeCache":
        span = slice(rows), slice(None), slice(max(lengths))
        return DecodeCache(self.k[span], self.v[span], positions.to(self.k.device), lengths)


def zeros(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return zeros; on a CPU the system hands out their memory as it is written to, so that much room costs no time."""
    if device.type != "cpu" or not policy().contents or 0 in shape:
        return torch.zeros(shape, device=device, dtype=dtype)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


class StateCache(LayerCache):
    """Holds what a recurrence carries from the last token on; there is no way back to an earlier one but the start.

    Args:
        tensors: (B, ...) each; zeros as long as the length is 0.
    """

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.tensors = tensors

    def store(self, carried: tuple[Tensor, ...], tokens: int) -> None:
        """Replace what is carried, after so many more tokens."""
        total, self.length = self.length + tokens, 0  # Ctrl-C may come between: what is half written counts for nothing
        for old, new in zip(self.tensors, carried, strict=True):
            old.copy_(new)
        self.length = total

    @property
    def rows(self) -> int:
        return len(self.tensors[0])

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def row(self, i: int) -> "StateCache":
        view = StateCache(tuple(x[i : i + 1] for x in self.tensors))
        view.drop_after(0)
        return view

    def copy_from(self, other: LayerCache) -> None:
        assert isinstance(other, StateCache)
        super().copy_from(other)
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine.copy_(theirs)

    def can_return_to(self, length: int) -> bool:
        return length in (0, self.length)

    def drop_after(self, length: int) -> None:
        super().drop_after(length)
        for x in self.tensors if self.length == 0 else ():
            x.zero_()

    def decoding(self, rows: int, positions: Tensor, lengths: tuple[int, ...]) -> "StateDecodeCache":
        return StateDecodeCache(tuple(x[:rows] for x in self.tensors), positions.to(self.tensors[0].device), lengths)


class ParallelCache(LayerCache):
    """Holds what a layer keeps that mixes tokens by attention and by a recurrence."""

    def __init__(self, attention: LayerCache, state: LayerCache) -> None:
        self.halves = attention, state
        self.uses_long_rope = False

    @property
    def length(self) -> int:  # type: ignore[override]  # each half counts its own
        return min(half.length for half in self.halves)

    @length.setter
    def length(self, length: int) -> None:
        for half in self.halves:
            half.length = length

    @property
    def rows(self) -> int:
        return self.halves[0].rows

    @property
    def nbytes(self) -> int:
        return sum(half.nbytes for half in self.halves)

    @property
    def keys_values(self) -> tuple[Tensor, ...]:
        return tuple(tensor for half in self.halves for tensor in half.keys_values)

    def row(self, i: int) -> "ParallelCache":
        first, second = (half.row(i) for half in self.halves)
        return ParallelCache(first, second)

    def copy_from(self, other: LayerCache) -> None:
        assert isinstance(other, ParallelCache)
        self.uses_long_rope = other.uses_long_rope
        for mine, theirs in zip(self.halves, other.halves, strict=True):
            mine.copy_from(theirs)

    def can_return_to(self, length: int) -> bool:
        return all(half.can_return_to(length) for half in self.halves)

    def drop_after(self, length: int) -> None:
        for half in self.halves:
            half.drop_after(length)

    def decoding(self, rows: int, positions: Tensor, lengths: tuple[int, ...]) -> "ParallelDecodeCache":
        first, second = (half.decoding(rows, positions, lengths) for half in self.halves)
        return ParallelDecodeCache((first, second), positions, lengths)


class DecodeCache:
    """Holds a layer's keys and values, to which each row adds one token at a position of its own.

    Nothing but tensors changes in it.

    Args:
        k, v: (B, n_query_groups, max_length, head_size).
        positions: int64 (B,), of the new tokens.
        lengths: how many tokens each row has, the new one included.
    """

    def __init__(self, k: Tensor, v: Tensor, positions: Tensor, lengths: tuple[int, ...] = ()) -> None:
        self.k, self.v, self.positions, self.lengths = k, v, positions, lengths

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of the new tokens, return those of all places, empty ones too."""
        rows = torch.arange(len(k), device=k.device)
        self.k[rows, :, self.positions], self.v[rows, :, self.positions] = k[:, :, 0], v[:, :, 0]
        return self.k, self.v


class StateDecodeCache(StateCache):
    """Holds what a recurrence carries for rows that each are at a position of their own; see DecodeCache."""

    def __init__(self, tensors: tuple[Tensor, ...], positions: Tensor, lengths: tuple[int, ...]) -> None:
        super().__init__(tensors)
        self.positions, self.lengths = positions, lengths


class ParallelDecodeCache:
    """Holds what a layer keeps of both its mixers for rows at positions of their own; see DecodeCache."""

    def __init__(
        self, halves: tuple["AnyDecodeCache", "AnyDecodeCache"], positions: Tensor, lengths: tuple[int, ...]
    ) -> None:
        self.halves, self.positions, self.lengths = halves, positions, lengths


class PackedPrefillCache:
    """Adds a row of packed sequences to the caches, empty so far, of each sequence."""

    def __init__(self, caches: tuple[LayerCache, ...], lengths: tuple[int, ...]) -> None:
        self.caches, self.lengths = caches, lengths

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        for cache, *new in zip(self.caches, k.split(self.lengths, 2), v.split(self.lengths, 2), strict=True):
            assert isinstance(cache, AttentionCache)
            cache.append(*new)
        return k, v


class SharedKeysValues:
    """Hands the keys and values of one layer, for one pass of the model, to others that attend to them.

    Args:
        cache: the layer's own, which may be none; that of a layer without keys counts tokens alone.
        source: the layer to whose keys and values this one attends; None: they are its own.
    """

    keys_values: tuple[Tensor, Tensor]

    def __init__(self, cache: "AttentionCache | DecodeCache | PackedPrefillCache | None", source: Self | None) -> None:
        self.cache, self.source = cache, source
        self.positions = cache.positions if isinstance(cache, DecodeCache) else None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens, return those of all that this layer attends to."""
        self.keys_values = (k, v) if self.cache is None else self.cache.append(k, v)
        return self.keys_values if self.source is None else self.source.keys_values


KVCache = list[LayerCache]
AnyDecodeCache = DecodeCache | StateDecodeCache | ParallelDecodeCache
AnyCache = LayerCache | AnyDecodeCache | PackedPrefillCache | SharedKeysValues


def sharing(caches: Sequence[Any], kv_layers: Sequence[int]) -> list[Any]:
    """Return the caches, or Nones, of all layers, with those in SharedKeysValues that share; see Config.kv_layers."""
    shared: list[Any] = []
    sources = {source for layer, source in enumerate(kv_layers) if source != layer}
    for layer, (cache, source) in enumerate(zip(caches, kv_layers, strict=True)):
        shares = layer in sources or source != layer
        own = shared[source] if source != layer else None
        shared.append(SharedKeysValues(cache, own) if shares else cache)
    return shared


def row_view(cache: KVCache, row: int) -> KVCache:
    """Return a cache of one sequence, in the memory of a row of another."""
    return [layer.row(row) for layer in cache]


def copy_cache(source: KVCache, target: KVCache) -> None:
    """Copy what is in one cache into another with as much room."""
    for old, new in zip(source, target, strict=True):
        new.copy_from(old)


def truncate(cache: KVCache, length: int) -> None:
    """Drop all but the first `length` tokens; or all, where a layer has a state, which cannot go back to there."""
    length = min([length, *(layer.length for layer in cache)])
    if not all(layer.can_return_to(length) for layer in cache):
        length = 0
    for layer in cache:
        layer.drop_after(length)
