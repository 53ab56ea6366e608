"""Keys and values of the tokens seen so far, for one sequence, a batch that decodes, or packed prompts."""

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer for the tokens seen so far."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v  # (B, n_query_groups, max_length, head_size)
        self.length = 0
        self.uses_long_rope = False  # whether the keys are rotated as those of a long sequence; see GPT.needs_reread

    positions: Tensor | None = None  # of new tokens: after those seen; see DecodeCache

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens, return those of all."""
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class DecodeCache:
    """A layer's cache to which each row adds one token at a position of its own; nothing but tensors changes in it.

    Args:
        k, v: as in LayerCache.
        positions: int64 (B,).
        lengths: of the rows, the new tokens included.
    """

    def __init__(self, k: Tensor, v: Tensor, positions: Tensor, lengths: tuple[int, ...] = ()) -> None:
        self.k, self.v, self.positions, self.lengths = k, v, positions, lengths

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of the new tokens, return those of all places, empty ones too."""
        rows = torch.arange(len(k), device=k.device)
        self.k[rows, :, self.positions], self.v[rows, :, self.positions] = k[:, :, 0], v[:, :, 0]
        return self.k, self.v


class PackedPrefillCache:
    """The caches of sequences that are packed into a row, empty so far, each of which its samples are added to."""

    positions: Tensor | None = None

    def __init__(self, caches: tuple[LayerCache, ...], lengths: tuple[int, ...]) -> None:
        self.caches, self.lengths = caches, lengths

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        for cache, *new in zip(self.caches, k.split(self.lengths, 2), v.split(self.lengths, 2), strict=True):
            cache.append(*new)
        return k, v


KVCache = list[LayerCache]


def row_view(cache: KVCache, row: int) -> KVCache:
    """Return a cache of one sequence, in the memory of a row of another."""
    return [LayerCache(layer.k[row : row + 1], layer.v[row : row + 1]) for layer in cache]


def copy_cache(source: KVCache, target: KVCache) -> None:
    """Copy what is in one cache into another with as much room."""
    for old, new in zip(source, target, strict=True):
        new.length, new.uses_long_rope = old.length, old.uses_long_rope
        new.k[:, :, : old.length], new.v[:, :, : old.length] = old.k[:, :, : old.length], old.v[:, :, : old.length]


def truncate(cache: KVCache, length: int) -> None:
    """Keep the first `length` tokens alone."""
    for layer in cache:
        layer.length = min(layer.length, length)
