"""Multi-head latent attention (DeepSeek-AI 2024, DeepSeek-V2): of a token a cache keeps one small latent, of which the
keys and values of all heads are made, and one rotated key that all heads share."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.kernels.attention import ScoreParams
from lit_gpt.model.config import Config
from lit_gpt.model.kv_cache import AnyCache, AttentionCache, DecodeCache, PackedPrefillCache, zeros
from lit_gpt.model.linear import Linear
from lit_gpt.model.mixers.mixer import Mixer
from lit_gpt.model.norms import RMSNorm
from lit_gpt.model.packed_inputs import Segments
from lit_gpt.model.rope import Rotation
from lit_gpt.model.sdpa import attend_within

WHOLE_LENGTH = 256  # tokens from which on a weight made of several costs less than their keys and values
EPS = 1e-6  # of the norms of latents, whatever the block's norms have


class LatentAttention(Mixer):
    """Attends with heads whose first `rotated_size` elements know positions, and whose others are made of latents.

    For methods the latents are the value, and the shared key is the key. What is made of a latent is adapted with it.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head, self.head_size, self.value_size = config.n_head, config.head_size, config.value_head_size
        self.latent_size, self.rotated_size = config.latent_size, config.rope_n_elem
        self.unrotated_size = self.head_size - self.rotated_size
        scale = config.head_size**-0.5 if config.attention_scale is None else config.attention_scale
        self.scores = ScoreParams(scale, None, None)
        queries = self.n_head * self.head_size
        first = config.query_latent or queries
        self.sizes = (first, self.latent_size, self.rotated_size)
        self.qkv = Linear(config.n_embd, sum(self.sizes), bias=False)
        ends = first, first + self.latent_size, sum(self.sizes)
        self.projections = {"query": [(0, ends[0])], "key": [(ends[1], ends[2])], "value": [(ends[0], ends[1])]}
        self.further = {"kv_up": ("key", "value")} | ({"q_up": ("query",)} if config.query_latent else {})
        self.q_norm = RMSNorm(first, EPS) if config.query_latent else None
        self.q_up = Linear(first, queries, bias=False) if config.query_latent else None
        self.kv_norm = RMSNorm(self.latent_size, EPS)
        # of each head the rows of the key, then of the value
        self.kv_up = Linear(self.latent_size, self.n_head * (self.unrotated_size + self.value_size), bias=False)
        self.proj = Linear(self.n_head * self.value_size, config.n_embd, bias=False)

    def project(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, ...]:
        """Project x (B, T, n_embd) to queries (B, n_head, T, head_size), the key that all heads share, and latents.

        Returns:
            besides the queries (B, 1, T, rotated_size) and (B, 1, T, latent_size).
        """
        q, latent, k = self.qkv(x).split(self.sizes, dim=-1)
        # under autocast norms give float32
        if self.q_norm is not None and self.q_up is not None:
            q = self.q_up(self.q_norm(q).to(q.dtype))
        latent = self.kv_norm(latent).to(latent.dtype)
        if rotation is not None:
            q, k = rotation.turn(q, self.n_head, self.head_size), rotation.turn(k, 1, self.rotated_size)
        return q.unflatten(-1, (self.n_head, -1)).transpose(1, 2), k.unsqueeze(1), latent.unsqueeze(1)

    def mix(self, parts: tuple[Tensor, ...], segments: Segments | None, cache: AnyCache | None) -> Tensor:
        """Return the attention output (B, T, n_head * value_head_size) for what `project` gives."""
        q, k, latent = parts
        if cache is not None:
            assert isinstance(cache, AttentionCache | DecodeCache | PackedPrefillCache)
            k, latent = cache.append(k, latent)
        positions = cache.positions if isinstance(cache, DecodeCache) else None
        weight = self.decoding_weight(latent.size(2)) if cache is not None and q.size(2) == 1 else None
        if weight is None:
            y = self.attend(q, k, latent, segments, positions)
        else:
            y = self.attend_to_latents(q, k, latent, segments, positions, weight)
        return y.transpose(1, 2).flatten(2)

    def decoding_weight(self, length: int) -> Tensor | None:
        """Return the weight of `kv_up` to take the products of a decoding step by; None: it has no one such weight, or
        `attend` to so many tokens costs less than to make it.
        """
        if type(self.kv_up) is Linear:
            return self.kv_up.weight
        whole = getattr(self.kv_up, "whole_weight", None)
        return whole() if whole and length > WHOLE_LENGTH else None

    def attend(
        self, q: Tensor, k: Tensor, latent: Tensor, segments: Segments | None, positions: Tensor | None
    ) -> Tensor:
        """Make each head's keys and values of the latents, and attend to them: (B, n_head, T, value_head_size)."""
        made = self.kv_up(latent.squeeze(1)).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
        unrotated, v = made.split((self.unrotated_size, self.value_size), dim=-1)
        k = torch.cat((k.expand(-1, self.n_head, -1, -1), unrotated), dim=-1)
        size = max(self.head_size, self.value_size)  # attention takes keys and values of one size
        q, k, v = (x if x.size(-1) == size else F.pad(x, (0, size - x.size(-1))) for x in (q, k, v))
        return attend_within(q, k, v, self.scores, segments, positions)[..., : self.value_size]

    def attend_to_latents(
        self,
        q: Tensor,
        k: Tensor,
        latent: Tensor,
        segments: Segments | None,
        positions: Tensor | None,
        weight: Tensor,
    ) -> Tensor:
        """Compute `attend` with the latents themselves for keys and values, which are made for no token seen before.

        The products that would make them are taken of the one query and of what it finds.
        """
        weight = weight.to(q.dtype).unflatten(0, (self.n_head, -1))  # (n_head, rows, latent_size)
        of_keys, of_values = weight.split((self.unrotated_size, self.value_size), dim=1)
        rotated, unrotated = q.split((self.rotated_size, self.unrotated_size), dim=-1)
        q = torch.cat((rotated, unrotated @ of_keys), dim=-1)
        seen = torch.cat((k, latent), dim=-1)
        found = attend_within(q, seen, seen, self.scores, segments, positions)
        return found[..., self.rotated_size :] @ of_values.mT

    def new_cache(self, rows: int, max_length: int, device: torch.device, dtype: torch.dtype) -> AttentionCache:
        sizes = self.rotated_size, self.latent_size
        return AttentionCache(*(zeros((rows, 1, max_length, n), device, dtype) for n in sizes))
