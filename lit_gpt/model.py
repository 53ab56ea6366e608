"""The GPT: embedding, blocks of attention and MLP, head. One file for every family; Config chooses among its options.

Finetuning methods attach from outside: by wrapping linear layers and norms, or as an attention's `prefix`.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt import fused
from lit_gpt.alibi import with_alibi
from lit_gpt.attention import Segments, attend, attend_at, attend_packed
from lit_gpt.block_attention import Scores
from lit_gpt.config import Config
from lit_gpt.errors import UserError
from lit_gpt.fused import ACTIVATIONS, Activation
from lit_gpt.loss import log_probabilities, summed_cross_entropy
from lit_gpt.moe import Experts, Router
from lit_gpt.rope import RotaryEmbedding

Rotation = tuple[Tensor, Tensor]  # cosine and sine, see RotaryEmbedding


@dataclass(frozen=True)
class Targets:
    """Which positions of a row are supervised, and with which token."""

    positions: Tensor  # int64 (n,), into the flattened (B * T,) hidden states
    labels: Tensor  # int64 (n,)


class LayerCache:
    """Keys and values of one layer for the tokens seen so far."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v  # (B, n_query_groups, max_length, head_size)
        self.length = 0
        self.long = False  # whether the keys are rotated as those of a long sequence; see GPT.outdated

    positions: Tensor | None = None  # of new tokens: after those seen; see OneMore

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens, return those of all."""
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class OneMore:
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


class Several:
    """The caches of sequences that are packed into a row, empty so far, each of which its samples are added to."""

    positions: Tensor | None = None

    def __init__(self, caches: tuple[LayerCache, ...], lengths: tuple[int, ...]) -> None:
        self.caches, self.lengths = caches, lengths

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        for cache, *new in zip(self.caches, k.split(self.lengths, 2), v.split(self.lengths, 2), strict=True):
            cache.append(*new)
        return k, v


KVCache = list[LayerCache]


def of_row(cache: KVCache, row: int) -> KVCache:
    """A cache of one sequence, in the place that a row of another has."""
    return [LayerCache(layer.k[row : row + 1], layer.v[row : row + 1]) for layer in cache]


def move(source: KVCache, target: KVCache) -> None:
    """Copy what is in one cache into another with as much room."""
    for old, new in zip(source, target, strict=True):
        new.length, new.long = old.length, old.long
        new.k[:, :, : old.length], new.v[:, :, : old.length] = old.k[:, :, : old.length], old.v[:, :, : old.length]


def forget(cache: KVCache, length: int) -> None:
    """Keep the first `length` tokens alone."""
    for layer in cache:
        layer.length = min(layer.length, length)


class GPT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.learned_positions else None
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=config.head_bias)
        self.rope = RotaryEmbedding(config)
        self.local_rope = self.rope
        if config.local_rope_base is not None:
            self.local_rope = RotaryEmbedding(replace(config, rope_base=config.local_rope_base, rope_scaling=None))
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make head and embedding one parameter, if the model has it so. To be repeated after weights are assigned."""
        if self.config.tie_embeddings:
            for name, parameter in self.wte.named_parameters():  # several, if it is quantized
                setattr(self.lm_head, name, parameter)

    def forward(
        self,
        idx: Tensor,
        segments: Segments | None = None,
        cache: KVCache | list[OneMore] | None = None,
        targets: Targets | None = None,
        last: bool = False,
    ) -> Tensor:
        """Logits, or the loss if `targets` are given.

        Args:
            idx: token ids, int64 (B, T).
            segments: boundaries of the samples packed into the row; B must be 1. None: each row is one sequence.
            cache: what `kv_cache` made; `idx` follows the tokens in it and is added. Or each layer's OneMore.
            targets: supervised positions. The logits of the others are never computed, nor all of them held at once.
            last: compute the logits of the last position alone.

        Returns:
            logits (B, T, padded_vocab_size), (B, 1, padded_vocab_size) with `last`; with `targets` their summed
            cross-entropy in nats, a float32 scalar.

        Raises:
            UserError: more tokens than the model has learned positions.
            ValueError: the cache is `outdated`.
        """
        x = self.hidden(idx, segments, cache)
        x = self.ln_f(x[:, -1:] if last else x)
        if targets is not None:
            x = x.flatten(0, 1)[targets.positions]
            return summed_cross_entropy(self.lm_head, x, targets.labels, self.finish)
        return self.finish(self.lm_head(x))

    @torch.no_grad()
    def score(self, idx: Tensor, segments: Segments, targets: Targets) -> tuple[Tensor, Tensor]:
        """The log-probability of each target, float32 (n,), and whether it is the likeliest token, bool (n,)."""
        x = self.ln_f(self.hidden(idx, segments).flatten(0, 1)[targets.positions])
        return log_probabilities(self.lm_head, x, targets.labels, self.finish)

    def hidden(
        self,
        idx: Tensor,
        segments: Segments | None = None,
        cache: KVCache | list[OneMore] | list[Several] | None = None,
        length: int | None = None,
    ) -> Tensor:
        """What the last block gives, (B, T, n_embd), before norm and head; arguments and errors as of `forward`.

        Args:
            length: that the sequence is about to reach, whose angles are to hold. None: it ends with `idx`.
        """
        if segments is not None:
            positions, lengths = segments.positions, segments.lengths
        elif cache and isinstance(cache[0], OneMore):
            positions, lengths = cache[0].positions.unsqueeze(1), cache[0].lengths
        else:
            start = cache[0].length if cache else 0
            end = start + idx.size(1)
            length = length or end
            if cache and self.outdated(cache, length):
                raise ValueError(f"with {length} tokens other angles hold: forget the cache and give all tokens")
            if cache:
                cache[0].long = self.rope.is_long(length)
            positions, lengths = torch.arange(start, end, device=idx.device), (length,)
        x = self.embed(idx, positions, lengths)  # (B, T, n_embd)
        rotations = self.rotations(positions, lengths, x.dtype)
        for layer, (block, rotation) in enumerate(zip(self.h, rotations, strict=True)):
            x = block(x, rotation, segments, cache[layer] if cache else None)
        return x

    def embed(self, idx: Tensor, positions: Tensor, lengths: tuple[int, ...]) -> Tensor:
        x, scale, limit = self.wte(idx), self.config.embedding_scale, self.config.block_size
        if scale != 1.0:
            x = x * torch.tensor(scale, dtype=x.dtype)  # rounded as the weights are, since the models were trained so
        if self.wpe is None:
            return x
        if max(lengths) > limit:
            raise UserError(f"{max(lengths)} tokens exceed the model's {limit} learned positions; give it fewer")
        return x + self.wpe(positions)

    def finish(self, logits: Tensor) -> Tensor:
        """Logits from what the head gives. Not part of the head: LoRA and Adapter v2 change its output before this."""
        divisor, cap = self.config.logit_divisor, self.config.logit_softcap
        logits = logits if divisor == 1.0 else logits / divisor
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def rotations(self, positions: Tensor, lengths: tuple[int, ...], dtype: torch.dtype) -> list[Rotation | None]:
        """Of each layer, if it has one; see RotaryEmbedding."""
        everywhere = within = self.rope(positions, lengths, dtype)
        if self.local_rope is not self.rope:
            within = self.local_rope(positions, lengths, dtype)
        layers, unrotated = range(len(self.h)), self.config.unrotated_layers
        kinds = [everywhere if self.config.window(layer) is None else within for layer in layers]
        return [None if layer in unrotated else kinds[layer] for layer in layers]

    def outdated(self, cache: KVCache, length: int) -> bool:
        """Whether a sequence that grows to `length` tokens must be read again, since its keys in the cache are rotated
        by other angles than LongRoPE has for that length."""
        return cache[0].length > 0 and cache[0].long != self.rope.is_long(length)

    def kv_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `batch_size` sequences of up to `max_length` tokens, in the model's dtype and place."""
        shape = (batch_size, self.config.n_query_groups, max_length, self.config.head_size)
        new = partial(torch.zeros, shape, device=self.wte.weight.device, dtype=self.dtype)
        return [LayerCache(new(), new()) for _ in self.h]

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden states: the embedding's, or if it is quantized its scales'."""
        return next(p.dtype for p in self.wte.parameters() if p.is_floating_point())

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint_dir: Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        quantize: str | None = None,
    ) -> "GPT":
        """The model in a converted checkpoint folder, in evaluation mode.

        Args:
            dtype: of the weights; None: as stored.
            device: None: the CPU, where weights kept in the stored dtype stay mapped from the file.
            quantize: a format of lit_gpt.quantize, for a folder that is not quantized already.

        Raises:
            UserError: the folder is not a converted checkpoint, or its files are damaged or do not fit together.
        """
        from lit_gpt.base import Base

        return Base.of(checkpoint_dir, quantize).build(dtype, device)


class Block(nn.Module):
    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.parallel, self.scale = config.parallel_residual, config.residual_scale
        pre, post = (partial(norm, config) if there else nn.Identity for there in (config.pre_norm, config.post_norm))
        self.norm_1 = pre()
        self.attn = CausalSelfAttention(config, layer)
        self.post_norm_1 = post()
        self.norm_2 = None if config.shared_attention_norm else pre()
        self.mlp = MLPS[config.mlp_class](config)
        self.post_norm_2 = post()

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None,
        segments: Segments | None,
        cache: LayerCache | OneMore | Several | None,
    ) -> Tensor:
        n_1, q, k, v = self.enter(x, rotation)
        y = self.attn.find(q, k, v, segments, cache)
        del q, k, v  # not to be held where no backward pass follows
        return self.leave(x, n_1, y)

    # what comes before attention and what after it are functions of tensors alone, fit to be compiled

    def enter(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The normed x, and its queries, keys and values."""
        n_1 = self.norm_1(x)
        return n_1, *self.attn.heads(n_1, rotation)

    def leave(self, x: Tensor, n_1: Tensor, y: Tensor) -> Tensor:
        """What the block gives, from its input, that normed, and what the queries found."""
        h = self.post_norm_1(self.attn.proj(y))
        if self.parallel:
            return x + h + self.post_norm_2(self.mlp(n_1 if self.norm_2 is None else self.norm_2(x)))
        x = torch.add(x, h, alpha=self.scale)
        return torch.add(x, self.post_norm_2(self.mlp(self.norm_2(x))), alpha=self.scale)


class CausalSelfAttention(nn.Module):
    """Attention with one query head per head and `n_query_groups` key and value heads (Ainslie et al. 2023, GQA)."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.n_head, self.n_query_groups, self.head_size = config.n_head, config.n_query_groups, config.head_size
        self.sizes = config.qkv_sizes
        scale = config.head_size**-0.5 if config.attention_scale is None else config.attention_scale
        self.scores = Scores(scale, config.window(layer), config.attention_softcap)
        self.alibi = config.alibi
        # one product for all: rows of the queries, then of the keys, then of the values
        self.qkv = nn.Linear(config.n_embd, sum(self.sizes), bias=config.qkv_bias)
        self.qk_norm = QKNorm(config) if config.qk_norm else None
        self.proj = nn.Linear(config.n_head * config.head_size, config.n_embd, bias=config.proj_bias)
        self.register_module("prefix", None)  # adds to what the queries find; see lit_gpt.adapter

    def find(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, cache: LayerCache | OneMore | Several | None
    ) -> Tensor:
        """What the queries find, (B, T, n_head * head_size); q, k, v as `heads` gives them."""
        if cache is not None:
            k, v = cache.append(k, v)
        heads = q, k, v
        if self.alibi:
            positions = segments.positions if segments else torch.arange(k.size(2), device=k.device)
            heads = with_alibi(q, k, v, self.scores.scale, positions)
        if segments is not None:
            y = attend_packed(*heads, self.scores, segments)
        elif cache is not None and cache.positions is not None:
            y = attend_at(*heads, self.scores, cache.positions)
        else:
            y = attend(*heads, self.scores)
        if self.alibi:
            y = y[..., : self.head_size]
        if self.prefix is not None:
            y = y + self.prefix(q, self)
        return y.transpose(1, 2).flatten(2)

    def heads(self, x: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, n_head, T, head_size), keys and values (B, n_query_groups, T, head_size) of x (B, T, n_embd)."""
        qkv = self.qkv(x)
        if self.qk_norm is not None:
            q, k, v = qkv.split(self.sizes, dim=-1)
            qkv = torch.cat((*self.qk_norm(q, k), v), dim=-1)
        if rotation is not None:
            qkv = fused.rotate(qkv, *rotation, self.n_head + self.n_query_groups, self.head_size)
        return tuple(y.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for y in qkv.split(self.sizes, dim=-1))


def activation(config: Config) -> Activation:
    if config.activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(f"config.json: the activation '{config.activation}' is not supported; expected one of {known}")
    return ACTIVATIONS[config.activation]


class GptNeoxMLP(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, config.intermediate_size, bias=config.bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.bias)
        self.activation = activation(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.inner(self.fc(x)))

    def inner(self, x: Tensor) -> Tensor:
        return self.activation(x)


class SwiGLU(nn.Module):
    """Shazeer 2020, GLU Variants Improve Transformer; gate and up are one product, the gate's rows first."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=config.bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.bias)
        self.activation = activation(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.inner(self.gate_up(x)))

    def inner(self, gate_up: Tensor) -> Tensor:
        return fused.gated(gate_up, self.activation)


class MoE(nn.Module):
    """Many SwiGLUs, the experts; each token goes through a few of them (Jiang et al. 2024, Mixtral of Experts).

    Training has no loss besides that of the tokens. transformers' one that balances the experts' load is off as well,
    unless `output_router_logits` asks for it.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        n, inner = config.n_expert, config.intermediate_size
        self.router = Router(config.n_embd, n, config.n_expert_per_token, config.norm_expert_weights)
        self.gate_up = Experts(n, config.n_embd, 2 * inner)
        self.proj = Experts(n, inner, config.n_embd)
        self.activation = activation(config)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, routes = self.router(tokens)
        gate_up = self.gate_up(routes.dispatch(tokens), routes)
        y = self.proj(self.inner(gate_up), routes)
        return routes.combine(y, weights).view_as(x)

    def inner(self, gate_up: Tensor) -> Tensor:
        return fused.gated(gate_up, self.activation)


MLPS = {"GptNeoxMLP": GptNeoxMLP, "SwiGLU": SwiGLU, "MoE": MoE}


class RMSNorm(nn.Module):
    """Zhang & Sennrich 2019; the mean square is taken in float32."""

    offset = 0.0  # added to the weight

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - self.offset))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return fused.rms_norm(x, self.weight, self.eps, self.offset)


class UnitOffsetRMSNorm(RMSNorm):
    """Gemma's, whose stored weight is the distance from 1."""

    offset = 1.0


NORMS = {
    "LayerNorm": nn.LayerNorm,
    "BiaslessLayerNorm": partial(nn.LayerNorm, bias=False),
    "RMSNorm": RMSNorm,
    "UnitOffsetRMSNorm": UnitOffsetRMSNorm,
}


def norm(config: Config, size: int | None = None) -> nn.Module:
    return NORMS[config.norm_class](size or config.n_embd, eps=config.norm_eps)


class QKNorm(nn.Module):
    """Norms of queries and keys (Dehghani et al. 2023), over the whole projections or over each head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        sizes, head_size = config.qkv_sizes[:2], config.head_size
        self.widths = sizes if config.qk_norm == "projection" else (head_size, head_size)
        if config.qk_norm == "heads":
            self.q, self.k = (LayerNorms(n // head_size, head_size, config.norm_eps) for n in sizes)
        else:
            self.q, self.k = (norm(config, width) for width in self.widths)

    def forward(self, *qk: Tensor) -> tuple[Tensor, Tensor]:
        """Normed queries and keys, of the shapes that they had: (B, T, heads * head_size)."""
        parts = zip((self.q, self.k), qk, self.widths, strict=True)
        # under autocast norms give float32, in which attention would be slow
        return tuple(norm(x.unflatten(-1, (-1, width))).flatten(-2).to(x.dtype) for norm, x, width in parts)


class LayerNorms(nn.LayerNorm):
    """A LayerNorm for each of `n` heads, without bias; x: (..., n, size)."""

    def __init__(self, n: int, size: int, eps: float) -> None:
        super().__init__(size, eps=eps, elementwise_affine=False)
        self.weight = nn.Parameter(torch.ones(n * size))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, eps=self.eps) * self.weight.view(x.shape[-2:])
