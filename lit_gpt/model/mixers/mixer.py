"""What a block's token mixer is when it is no plain attention; most are recurrences, with a state in place of keys and
values."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from lit_gpt.model.kv_cache import AnyCache, LayerCache, PackedPrefillCache, StateCache
from lit_gpt.model.packed_inputs import Segments
from lit_gpt.model.rope import Rotation


class Mixer(nn.Module):
    """Mixes tokens within each sample: `project`, then `mix`, then the layer `proj`.

    Attributes:
        qkv: the projection of the input, one product for all that is made of it.
        sizes: how many of its rows each part has that it is cut into.
        projections: rows (start, stop) of `qkv` that make queries, keys and values, and in a list with the queries the
            gate of the output; methods adapt them by these names.
        further: by its name, each layer that makes these of fewer numbers that `qkv` gives, and which of them.
    """

    qkv: nn.Module
    proj: nn.Module
    sizes: tuple[int, ...]
    projections: dict[str, list[tuple[int, int]]]
    further: dict[str, tuple[str, ...]] = {}

    @abstractmethod
    def project(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, ...]:
        """Project x (B, T, n_embd) to what `mix` takes."""

    @abstractmethod
    def mix(self, parts: tuple[Tensor, ...], segments: Segments | None, cache: AnyCache | None) -> Tensor:
        """Return what is made of them within each sample, (B, T, in_features of `proj`)."""

    @abstractmethod
    def new_cache(self, rows: int, max_length: int, device: torch.device, dtype: torch.dtype) -> LayerCache:
        """Make an empty cache for sequences of up to `max_length` tokens."""


class Recurrence(Mixer):
    """Mixes tokens by what it carries from one to the next."""

    def project(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, ...]:
        """Project x (B, T, n_embd) to what `mix` takes, each (B, T, size). There are no positions but the order."""
        return self.qkv(x).split(self.sizes, dim=-1)

    @abstractmethod
    def recur(
        self, parts: tuple[Tensor, ...], positions: Tensor | None, carried: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the mixed tokens (B, T, in_features of `proj`), and what is carried on.

        Args:
            parts: what `project` gave.
            positions: int64 (T,), 0 where a packed sample begins; None: nowhere.
            carried: from the tokens before, as `blank` shapes it.
        """

    @abstractmethod
    def blank(self, rows: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return what rows carry before their first token: zeros, (rows, ...) each."""

    def mix(self, parts: tuple[Tensor, ...], segments: Segments | None, cache: AnyCache | None) -> Tensor:
        """Mix tokens within each sample; what `recur` returns, with what is carried kept in the cache."""
        if isinstance(cache, PackedPrefillCache):  # each prompt leaves a state of its own
            rows = zip(*(part.split(cache.lengths, 1) for part in parts), strict=True)
            return torch.cat([self.mix(row, None, own) for row, own in zip(rows, cache.caches, strict=True)], dim=1)
        if cache is None:
            x, positions = parts[0], segments.positions if segments else None
            return self.recur(parts, positions, self.blank(len(x), x.device, x.dtype))[0]
        assert isinstance(cache, StateCache)
        y, carried = self.recur(parts, None, cache.tensors)
        cache.store(carried, parts[0].size(1))
        return y

    def new_cache(self, rows: int, max_length: int, device: torch.device, dtype: torch.dtype) -> StateCache:
        """Make an empty cache, whose size no length bears on."""
        return StateCache(self.blank(rows, device, dtype))
