"""Attention and a recurrence beside each other in one layer, whose outputs are added (Falcon-H1)."""

from typing import Any

import torch
from torch import Tensor

from lit_gpt.model.config import Config
from lit_gpt.model.kv_cache import AnyCache, PackedPrefillCache, ParallelCache, ParallelDecodeCache
from lit_gpt.model.packed_inputs import Segments
from lit_gpt.model.rope import Rotation


class ParallelMixer:
    """Mixes a block's tokens by its attention and by its other mixer; the layers are theirs, none is its own.

    Source: Zuo et al. 2025, Falcon-H1 (arXiv 2507.22448).
    """

    def __init__(self, config: Config, attention: Any, other: Any) -> None:
        self.both = attention, other
        self.input_scales, self.output_scales = config.mixer_input_scales, config.mixer_output_scales
        self.sizes = config.qkv_sizes[0], config.state_heads * config.state_head_size  # of what `mix` gives

    def project(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, ...]:
        """Project x (B, T, n_embd) to what `mix` takes: attention's parts, then the other's, which are three."""
        attention, other = (scaled(x, scale) for scale in self.input_scales)
        return *self.both[0].project(attention, rotation), *self.both[1].project(other, None)

    def mix(self, parts: tuple[Tensor, ...], segments: Segments | None, cache: AnyCache | None) -> Tensor:
        """Return what both make of them, beside each other in the last dimension."""
        ends = -len(self.both[1].sizes)
        halves = zip(self.both, (parts[:ends], parts[ends:]), halves_of(cache), strict=True)
        return torch.cat([mixer.mix(own, segments, half) for mixer, own, half in halves], dim=-1)

    def proj(self, y: Tensor) -> Tensor:
        outputs = zip(self.both, y.split(self.sizes, dim=-1), self.output_scales, strict=True)
        first, second = (scaled(mixer.proj(own), scale) for mixer, own, scale in outputs)
        return first + second

    def new_cache(self, rows: int, max_length: int, device: torch.device, dtype: torch.dtype) -> ParallelCache:
        """Make an empty cache for sequences of up to `max_length` tokens."""
        return ParallelCache(*(mixer.new_cache(rows, max_length, device, dtype) for mixer in self.both))


def scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1.0 else x * scale


def halves_of(cache: AnyCache | None) -> tuple[Any, Any]:
    """Return the caches of attention and of the other mixer."""
    if cache is None:
        return None, None
    if isinstance(cache, PackedPrefillCache):
        rows = zip(*(halves_of(row) for row in cache.caches), strict=True)
        first, second = (PackedPrefillCache(halves, cache.lengths) for halves in rows)
        return first, second
    assert isinstance(cache, ParallelCache | ParallelDecodeCache)
    return cache.halves
