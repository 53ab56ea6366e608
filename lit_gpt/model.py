"""The GPT: embedding, blocks of attention and MLP, head. One file for every family; Config chooses among its options.

Finetuning methods attach from outside: by wrapping linear layers and norms, or as an attention's `prefix`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt import fused
from lit_gpt.config import Config
from lit_gpt.errors import UserError
from lit_gpt.loss import summed_cross_entropy

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
# from the gradient of the result and the input to the gradient of the input
ACTIVATION_GRADIENTS = {
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "relu": partial(torch.ops.aten.threshold_backward, threshold=0),
    "silu": torch.ops.aten.silu_backward,
}


@dataclass(frozen=True)
class Segments:
    """Where the samples that are packed into one row begin and end. Attention never crosses a boundary."""

    lengths: tuple[int, ...]
    offsets: Tensor  # int32 (n + 1,), from 0 to the row's length
    positions: Tensor  # int64 (T,), restarting with each sample

    @classmethod
    def of(cls, lengths: list[int], device: torch.device | str = "cpu") -> "Segments":
        counts = torch.tensor([0, *lengths])
        positions = torch.cat([torch.arange(n) for n in lengths])
        offsets = counts.cumsum(0).to(torch.int32)
        return cls(tuple(lengths), offsets.to(device, non_blocking=True), positions.to(device, non_blocking=True))


@dataclass(frozen=True)
class Targets:
    """Which positions of a row are supervised, and with which token."""

    positions: Tensor  # int64 (n,), into the flattened (B * T,) hidden states
    labels: Tensor  # int64 (n,)


class LayerCache:
    """Keys and values of one layer for the tokens seen so far."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> None:
        self.k = torch.zeros(shape, device=device, dtype=dtype)  # (B, n_query_groups, max_length, head_size)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of new tokens, return those of all."""
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


KVCache = list[LayerCache]


def forget(cache: KVCache, length: int) -> None:
    """Keep the first `length` tokens alone."""
    for layer in cache:
        layer.length = min(layer.length, length)


class GPT(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=config.head_bias)
        self.rope = RotaryEmbedding(config)
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
        cache: KVCache | None = None,
        targets: Targets | None = None,
        last: bool = False,
    ) -> Tensor:
        """Logits, or the loss if `targets` are given.

        Args:
            idx: token ids, int64 (B, T).
            segments: boundaries of the samples packed into the row; B must be 1. None: each row is one sequence.
            cache: what `kv_cache` made; `idx` follows the tokens in it and is added.
            targets: supervised positions. The logits of the others are never computed, nor all of them held at once.
            last: compute the logits of the last position alone.

        Returns:
            logits (B, T, padded_vocab_size), (B, 1, padded_vocab_size) with `last`; with `targets` their summed
            cross-entropy in nats, a float32 scalar.
        """
        positions = segments.positions if segments else torch.arange(idx.size(1), device=idx.device)
        x = self.wte(idx)  # (B, T, n_embd)
        rotation = self.rope(positions + cache[0].length if cache else positions, x.dtype)
        for layer, block in enumerate(self.h):
            x = block(x, rotation, segments, cache[layer] if cache else None)
        x = self.ln_f(x[:, -1:] if last else x)
        if targets is not None:
            return summed_cross_entropy(self.lm_head, x.flatten(0, 1)[targets.positions], targets.labels)
        return self.lm_head(x)

    def kv_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `batch_size` sequences of up to `max_length` tokens, in the model's dtype and place."""
        shape = (batch_size, self.config.n_query_groups, max_length, self.config.head_size)
        return [LayerCache(shape, self.wte.weight.device, self.dtype) for _ in self.h]

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
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.parallel = config.parallel_residual
        self.norm_1 = norm(config)
        self.attn = CausalSelfAttention(config)
        self.norm_2 = None if config.shared_attention_norm else norm(config)
        self.mlp = MLPS[config.mlp_class](config)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], segments: Segments | None, cache: LayerCache | None
    ) -> Tensor:
        n_1 = self.norm_1(x)
        h = self.attn(n_1, rotation, segments, cache)
        if self.parallel:
            return x + h + self.mlp(n_1 if self.norm_2 is None else self.norm_2(x))
        x = x + h
        return x + self.mlp(self.norm_2(x))


class CausalSelfAttention(nn.Module):
    """Attention with one query head per head and `n_query_groups` key and value heads (Ainslie et al. 2023, GQA)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_head, self.n_query_groups, self.head_size = config.n_head, config.n_query_groups, config.head_size
        self.sizes, self.window = config.qkv_sizes, config.sliding_window
        # one product for all: rows of the queries, then of the keys, then of the values
        self.qkv = nn.Linear(config.n_embd, sum(self.sizes), bias=config.qkv_bias)
        self.proj = nn.Linear(config.n_head * config.head_size, config.n_embd, bias=config.proj_bias)
        self.prefix: nn.Module | None = None  # adds to what the queries find; see lit_gpt.adapter

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], segments: Segments | None, cache: LayerCache | None
    ) -> Tensor:
        B, T, _ = x.shape
        qkv = fused.rotate(self.qkv(x), *rotation, self.n_head + self.n_query_groups, self.head_size)
        q, k, v = qkv.split(self.sizes, dim=-1)
        q = q.view(B, T, self.n_head, self.head_size).transpose(1, 2)  # (B, n_head, T, head_size)
        k = k.view(B, T, self.n_query_groups, self.head_size).transpose(1, 2)  # (B, n_query_groups, T, head_size)
        v = v.view(B, T, self.n_query_groups, self.head_size).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        y = attend(q, k, v, self.window) if segments is None else attend_packed(q, k, v, self.window, segments)
        if self.prefix is not None:
            y = y + self.prefix(q, self)
        return self.proj(y.transpose(1, 2).reshape(B, T, self.n_head * self.head_size))


def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Causal attention of queries that are the last T of S positions.

    Args:
        q: (B, n_head, T, head_size). k, v: (B, n_query_groups, S, head_size).
        window: how many positions a query sees, its own included; None: all before it.
    """
    T, S = q.size(2), k.size(2)
    if T == S and trains_on_cpu(q):
        return fused.attention(q, k, v, window, (T,))
    gqa = q.size(1) != k.size(1)
    if T == 1:
        first = 0 if window is None else max(0, S - window)
        return F.scaled_dot_product_attention(q, k[:, :, first:], v[:, :, first:], enable_gqa=gqa)
    if T == S and (window is None or S <= window):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    behind = torch.arange(S - T, S, device=q.device)[:, None] - torch.arange(S, device=q.device)
    seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=gqa)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, window: int | None, segments: Segments) -> Tensor:
    """Causal attention within each sample of a packed row; shapes as in `attend`, with B = 1 and S = T."""
    if flash_takes(q):
        return attend_varlen(q, k, v, window, segments)
    if trains_on_cpu(q):
        return fused.attention(q, k, v, window, segments.lengths)
    parts = zip(*(x.split(segments.lengths, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([attend(*part, window) for part in parts], dim=2)


def trains_on_cpu(q: Tensor) -> bool:
    """Whether a backward pass will follow where torch's own attention has a slow one."""
    return q.device.type == "cpu" and q.requires_grad and torch.is_grad_enabled()


def flash_takes(q: Tensor) -> bool:
    """Whether flash attention computes in this dtype, head size and on this device."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or q.size(-1) % 8 or q.size(-1) > 256:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, window: int | None, segments: Segments) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    heads = q.size(1)
    # every release that has varlen_attn takes equal head counts; grouped ones came later
    k, v = (x.repeat_interleave(heads // x.size(1), dim=1) for x in (k, v))
    rows = (x.squeeze(0).transpose(0, 1).contiguous() for x in (q, k, v))  # (T, n_head, head_size)
    longest, span = max(segments.lengths), (-1 if window is None else window - 1, 0)
    y = varlen_attn(*rows, segments.offsets, segments.offsets, longest, longest, window_size=span)
    return y.transpose(0, 1).unsqueeze(0)


def activation(config: Config) -> Callable[[Tensor], Tensor]:
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
        return self.proj(self.activation(self.fc(x)))


class SwiGLU(nn.Module):
    """Shazeer 2020, GLU Variants Improve Transformer; gate and up are one product, the gate's rows first."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=config.bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.bias)
        self.activation, self.gradient = activation(config), ACTIVATION_GRADIENTS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(fused.gated(self.gate_up(x), self.activation, self.gradient))


MLPS = {"GptNeoxMLP": GptNeoxMLP, "SwiGLU": SwiGLU}


class RMSNorm(nn.Module):
    """Zhang & Sennrich 2019; the mean square is taken in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return fused.rms_norm(x, self.weight, self.eps)


def norm(config: Config) -> nn.Module:
    return {"LayerNorm": nn.LayerNorm, "RMSNorm": RMSNorm}[config.norm_class](config.n_embd, eps=config.norm_eps)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al. 2021, RoFormer), rotating the two halves of the rotated elements."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.frequencies, self.attention_factor = rope_frequencies(config)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine for int64 `positions` (T,) or (B, T): each (..., T, rope_n_elem) of `dtype`."""
        # not a buffer: it must stay float32 whatever the model is cast to, and needs no place in a checkpoint
        self.frequencies = self.frequencies.to(positions.device)
        angles = positions[..., None].float() * self.frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return tuple((f(angles) * self.attention_factor).to(dtype) for f in (torch.cos, torch.sin))


def rope_frequencies(config: Config) -> tuple[Tensor, float]:
    """Angle per position of each rotated pair, float32 (rope_n_elem / 2,), and the factor on cosine and sine."""
    with torch.device("cpu"):  # also for a model on the meta device: these are computed, not loaded
        n, base = config.rope_n_elem, config.rope_base
        frequencies = 1.0 / base ** (torch.arange(0, n, 2, dtype=torch.int64).float() / n)
        scaling = config.rope_scaling
        if not scaling:
            return frequencies, 1.0
        if scaling["rope_type"] not in ROPE_SCALING:
            known = ", ".join(ROPE_SCALING)
            raise UserError(
                f"config.json: rope_type '{scaling['rope_type']}' is not supported; expected one of {known}"
            )
        try:
            return ROPE_SCALING[scaling["rope_type"]](frequencies, scaling, config)
        except KeyError as missing:
            raise UserError(f"config.json: rope_type '{scaling['rope_type']}' needs the field {missing}") from None


def rope_linear(frequencies: Tensor, scaling: dict, config: Config) -> tuple[Tensor, float]:
    """Position interpolation (Chen et al. 2023)."""
    return frequencies / scaling["factor"], 1.0


def rope_llama3(frequencies: Tensor, scaling: dict, config: Config) -> tuple[Tensor, float]:
    """Llama 3.1: long waves are interpolated, short ones kept, those between blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling["factor"]), 1.0


def rope_yarn(frequencies: Tensor, scaling: dict, config: Config) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023), equations 17 to 22."""
    n, factor = config.rope_n_elem, scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or config.block_size

    def pair_turning(times: float) -> float:  # the pair that turns so often within the original context
        return n * math.log(original / (times * 2 * math.pi)) / (2 * math.log(config.rope_base))

    low, high = pair_turning(scaling.get("beta_fast") or 32), pair_turning(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n - 1)
    ramp = ((torch.arange(n // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / factor * ramp, yarn_attention_factor(scaling)


def yarn_attention_factor(scaling: dict) -> float:
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)


ROPE_SCALING = {"linear": rope_linear, "llama3": rope_llama3, "yarn": rope_yarn}
