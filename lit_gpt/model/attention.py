"""Causal self-attention as a module of a block."""

import torch
from torch import Tensor, nn

from lit_gpt.kernels.attention import ScoreParams
from lit_gpt.model.alibi import with_alibi
from lit_gpt.model.config import Config
from lit_gpt.model.kv_cache import (
    AnyCache,
    AttentionCache,
    DecodeCache,
    PackedPrefillCache,
    SharedKeysValues,
    zeros,
)
from lit_gpt.model.linear import Linear
from lit_gpt.model.norms import PlainRMSNorm, QKNorm
from lit_gpt.model.packed_inputs import Segments
from lit_gpt.model.rope import Rotation
from lit_gpt.model.sdpa import attend_in_groups, attend_within


class CausalSelfAttention(nn.Module):
    """Attention with one query head per head and `n_query_groups` key and value heads (Ainslie et al. 2023, GQA)."""

    further: dict[str, tuple[str, ...]] = {}  # see lit_gpt.model.mixers.mixer.Mixer
    prefix: nn.Module | None  # adds to the attention output; see lit_gpt.methods.adapter
    virtual: nn.Module | None  # puts keys and values for those of virtual tokens; see lit_gpt.methods.prompt

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.sizes, self.gated = config.qkv_rows(layer), config.attention_gate
        config = config.at(layer)
        self.n_head, self.head_size = config.n_head, config.head_size
        self.n_query_groups = self.sizes[1] // self.head_size  # its own; 0 if it attends to another layer's
        self.values_from_keys = self.sizes[1] > self.sizes[2]
        scale = config.head_size**-0.5 if config.attention_scale is None else config.attention_scale
        self.scores = ScoreParams(scale, config.window(layer), config.attention_softcap, config.chunk(layer))
        self.alibi, self.alibi_rounded, self.clip = config.alibi, config.alibi_rounded, config.clip_qkv
        self.sinks = nn.Parameter(torch.zeros(config.n_head)) if config.attention_sinks else None
        # one product for all: rows of the queries, then of the keys, the values, and what gates the output
        gate = self.sizes[0] if self.gated else 0
        self.qkv = Linear(config.n_embd, sum(self.sizes) + gate, bias=config.qkv_bias)
        self.norms_rotated = config.qk_norm_rotated
        normed = config.qk_norm and not (self.norms_rotated and layer in config.unrotated_layers)
        self.qk_norm = QKNorm(config, self.sizes[:2]) if normed else None
        self.v_norm = PlainRMSNorm(self.head_size, config.norm_eps) if config.value_norm else None
        self.proj = Linear(config.n_head * config.head_size, config.n_embd, bias=config.proj_bias)
        self.group: int | None = None  # in training tokens attend within groups of this many, see attend_in_groups
        self.register_module("prefix", None)
        self.register_module("virtual", None)

    @property
    def projections(self) -> dict[str, list[tuple[int, int]]]:
        """Return the rows (start, stop) of `qkv` by the names under which methods adapt them: a gate is the query's."""
        q, k, v = self.sizes
        gate = [(q + k + v, 2 * q + k + v)] if self.gated else []
        own = {"query": [(0, q), *gate], "key": [(q, q + k)], "value": [(q + k, q + k + v)]}
        return {name: spans for name, spans in own.items() if spans[0][0] < spans[0][1]}

    def project(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, ...]:
        """Project x (B, T, n_embd) to what `mix` takes: queries, keys and values, and the output's gate if any."""
        qkv = self.qkv(x)
        q, k, _ = self.sizes
        heads, widths = self.n_head + self.n_query_groups, [q, k, k, *([q] if self.gated else [])]
        if self.values_from_keys:
            qkv = torch.cat((qkv, qkv[..., q : q + k]), dim=-1)
        if not self.norms_rotated:
            qkv = self.normed(qkv)
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        if rotation is None:
            parts = qkv.split(widths, dim=-1)
        elif self.norms_rotated:
            parts = self.normed(rotation.turn(qkv, heads, self.head_size)).split(widths, dim=-1)
        else:
            parts = rotation.turn_split(qkv, heads, self.head_size, widths)
        queries, keys, values, *gate = parts
        if rotation is not None and rotation.query_scale is not None:
            queries = queries * rotation.query_scale.to(qkv.dtype)
        each = queries, keys, values
        q, k, v = (y.unflatten(-1, (y.size(-1) // self.head_size, self.head_size)) for y in each)
        v = v if self.v_norm is None else self.v_norm(v)
        return *(y.transpose(1, 2) for y in (q, k, v)), *gate

    def mix(self, parts: tuple[Tensor, ...], segments: Segments | None, cache: AnyCache | None) -> Tensor:
        """Return the attention output (B, T, n_head * head_size) for what `project` gives."""
        q, k, v, *gate = parts
        y = self.attend(q, k, v, segments, cache)
        return y * torch.sigmoid(gate[0]) if gate else y

    def new_cache(self, rows: int, max_length: int, device: torch.device, dtype: torch.dtype) -> AttentionCache:
        """Make an empty cache for sequences of up to `max_length` tokens."""
        shape = rows, self.n_query_groups, max_length, self.head_size
        return AttentionCache(*(zeros(shape, device, dtype) for _ in "kv"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, cache: AnyCache | None) -> Tensor:
        """Return the attention output (B, T, n_head * head_size) for q, k, v as `project_qkv` gives them."""
        if self.virtual is not None:
            k, v = self.virtual(k, v)
        if cache is not None:
            assert isinstance(cache, AttentionCache | DecodeCache | PackedPrefillCache | SharedKeysValues)
            k, v = cache.append(k, v)
        heads = q, k, v
        if self.alibi:
            places = segments.positions if segments else torch.arange(k.size(2), device=k.device)
            heads = with_alibi(*heads, self.scores.scale, places, self.alibi_rounded)
        positions = cache.positions if isinstance(cache, DecodeCache | SharedKeysValues) else None
        if self.group and self.training:
            cut = segments or Segments.of((k.size(2),), k.device)
            y = attend_in_groups(*heads, self.scores, cut, self.group, self.sinks)
        else:
            y = attend_within(*heads, self.scores, segments, positions, self.sinks)
        if self.alibi:
            y = y[..., : self.head_size]
        if self.prefix is not None:
            y = y + self.prefix(q, self)
        return y.transpose(1, 2).flatten(2)

    def project_qkv(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Project x (B, T, n_embd) to queries, keys and values.

        Returns:
            Queries (B, n_head, T, head_size); keys and values (B, n_query_groups, T, head_size).
        """
        q, k, v, *_ = self.project(x, rotation)
        return q, k, v

    def normed(self, qkv: Tensor) -> Tensor:
        """Return the projections with normed queries and keys, if the model norms them."""
        if self.qk_norm is None:
            return qkv
        q, k, rest = qkv.split((*self.sizes[:2], qkv.size(-1) - sum(self.sizes[:2])), dim=-1)
        return torch.cat((*self.qk_norm(q, k), rest), dim=-1)
