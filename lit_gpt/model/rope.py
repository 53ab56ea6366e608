"""Rotary position embedding (Su et al. 2021, RoFormer) and the ways to stretch it over longer contexts."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_gpt.errors import UserError
from lit_gpt.kernels import functional
from lit_gpt.model.config import Config


class Rotation(NamedTuple):
    """The rotation of queries and keys at some positions; see RotaryEmbedding. An unrotated layer's has no angles."""

    cos: Tensor | None
    sin: Tensor | None
    query_scale: Tensor | None = None  # multiplies the queries; (T, 1) or (B, 1, 1)

    def turn(self, x: Tensor, heads: int, head_size: int) -> Tensor:
        """Rotate the first `heads` heads of x (B, T, any number of heads * head_size)."""
        if self.cos is None or self.sin is None:
            return x
        return functional.rotate(x, self.cos, self.sin, heads, head_size)

    def turn_split(self, x: Tensor, heads: int, head_size: int, widths: list[int]) -> tuple[Tensor, ...]:
        """Rotate as `turn` does, and split into parts of these widths; x, which may be changed, is needed no more."""
        if self.cos is None or self.sin is None:
            return x.split(widths, dim=-1)
        return functional.rotate_split(x, self.cos, self.sin, heads, head_size, widths)


class RotaryEmbedding(nn.Module):
    """Computes the angles that rotate the two halves of the rotated elements against each other."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        # float32 (rope_n_elem / 2,); with LongRoPE two rows, the second for sequences beyond the original context
        self.frequencies, self.attention_factor = rope_frequencies(config)
        self.growth, self.growth_length = config.query_growth, config.query_growth_length
        self.growth_start = config.query_growth_start
        scaling = config.rope_scaling
        self.original = scaling["original_max_position_embeddings"] if scaling and self.frequencies.ndim == 2 else None

    def is_long(self, length: int) -> bool:
        """Return whether LongRoPE rotates a sequence of so many tokens as a long one."""
        return self.original is not None and length > self.original

    def forward(self, positions: Tensor, lengths: tuple[int, ...], dtype: torch.dtype) -> Rotation:
        """Return cosine and sine for int64 `positions` (T,): each (T, rope_n_elem) of `dtype`.

        Args:
            positions: or (B, 1), of rows that are each at another; then the result is (B, 1, rope_n_elem).
            lengths: how long the sequences are that are packed into the T positions; or a single one, or each row, with
                what precedes it.
        """
        # not a buffer: it must stay float32 whatever the model is cast to, and needs no place in a checkpoint
        self.frequencies = frequencies = self.frequencies.to(positions.device)
        if self.original is not None:
            rows = [frequencies[int(self.is_long(n))] for n in lengths]
            counts = [1] * len(rows) if positions.ndim == 2 else lengths
            each = (row.expand(n, -1) for row, n in zip(rows, counts, strict=True))
            frequencies = rows[0] if len(rows) == 1 else torch.cat(list(each)).view(*positions.shape, -1)
        angles = positions[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = ((f(angles) * self.attention_factor).to(dtype) for f in (torch.cos, torch.sin))
        return Rotation(cos, sin, self.query_scale(positions, dtype))

    def query_scale(self, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return what scales the queries at these positions, (..., 1), as attention spreads over ever more keys."""
        if self.growth is None:
            return None
        times = (positions + self.growth_start).float().div(self.growth_length).floor()
        return (1 + self.growth * torch.log1p(times))[..., None].to(dtype)


def rope_frequencies(config: Config) -> tuple[Tensor, float]:
    """Return the angle per position of each rotated pair, float32 (rope_n_elem / 2,), and the factor on cos and sin."""
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
    """Interpolate positions (Chen et al. 2023)."""
    return frequencies / scaling["factor"], 1.0


def rope_llama3(frequencies: Tensor, scaling: dict, config: Config) -> tuple[Tensor, float]:
    """Interpolate long waves, keep short ones, and blend those between, as Llama 3.1 does."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling["factor"]), 1.0


def rope_yarn(frequencies: Tensor, scaling: dict, config: Config) -> tuple[Tensor, float]:
    """Interpolate by wavelength with YaRN (Peng et al. 2023), equations 17 to 22."""
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
    """Return YaRN's factor on cos and sin, from its own field or from the fields that DeepSeek's files have."""
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)


def rope_longrope(frequencies: Tensor, scaling: dict, config: Config) -> tuple[Tensor, float]:
    """Divide each frequency by one factor up to the original context, and another beyond (Ding et al. 2024, LongRoPE).

    Returns:
        Frequencies (2, rope_n_elem / 2), and the factor on cos and sin.

    Raises:
        UserError: the configuration does not hold a divisor for each pair.
    """
    original = scaling["original_max_position_embeddings"]
    divisors = [torch.tensor(scaling[key], dtype=torch.float32) for key in ("short_factor", "long_factor")]
    if any(d.shape != frequencies.shape for d in divisors):
        counts = " and ".join(str(d.numel()) for d in divisors)
        raise UserError(f"config.json: short_factor and long_factor hold {counts} numbers, expected {len(frequencies)}")
    stretch = scaling.get("factor") or config.block_size / original
    factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return frequencies / torch.stack(divisors), scaling.get("attention_factor") or factor


def rope_proportional(frequencies: Tensor, scaling: dict, config: Config) -> tuple[Tensor, float]:
    """Turn only the first pairs, those of the shortest waves (Gemma Team 2026, Gemma 4)."""
    turning = int(scaling.get("partial_rotary_factor", 1.0) * config.rope_n_elem // 2)
    still = torch.arange(len(frequencies)) >= turning
    return frequencies.masked_fill(still, 0) / scaling.get("factor", 1.0), 1.0


ROPE_SCALING = {
    "linear": rope_linear,
    "llama3": rope_llama3,
    "yarn": rope_yarn,
    "longrope": rope_longrope,
    "proportional": rope_proportional,
}
