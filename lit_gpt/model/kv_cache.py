"""Keys and values of the tokens seen so far, for one sequence, a batch that decodes, or packed prompts."""

import torch
from torch import Tensor


class LayerCache:
    """Holds the keys and values of one layer for the tokens seen so far."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v  # (B, n_query_groups, max_length, head_size)
        self.length = 0
        self.uses_long_rope = False  # whether the keys are rotated as those of a long sequence; see GPT.needs_reread

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens, return those of all."""
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


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


class PackedPrefillCache:
    """Adds a row of packed sequences to the caches, empty so far, of each sequence."""

    def __init__(self, caches: tuple[LayerCache, ...], lengths: tuple[int, ...]) -> None:
        self.caches, self.lengths = caches, lengths

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        for cache, *new in zip(self.caches, k.split(self.lengths, 2), v.split(self.lengths, 2), strict=True):
            cache.append(*new)
        return k, v


KVCache = list[LayerCache]
AnyCache = LayerCache | DecodeCache | PackedPrefillCache


def row_view(cache: KVCache, row: int) -> KVCache:
    """Return a cache of one sequence, in the memory of a row of another."""
    return [LayerCache(layer.k[row : row + 1], layer.v[row : row + 1]) for layer in cache]


def copy_cache(source: KVCache, target: KVCache) -> None:
    """Copy what is in one cache into another with as much room."""
    for old, new in zip(source, target, strict=True):
        new.length, new.uses_long_rope = old.length, old.uses_long_rope
        new.k[:, :, : old.length], new.v[:, :, : old.length] = old.k[:, :, : old.length], old.v[:, :, : old.length]


def truncate(cache: KVCache, length: int) -> None:
    """Drop all but the first `length` tokens."""
    for layer in cache:
        layer.length = min(layer.length, length)
