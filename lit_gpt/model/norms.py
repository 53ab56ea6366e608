"""Normalization layers, by their names in Config."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.errors import UserError
from lit_gpt.kernels import norms
from lit_gpt.model.config import Config


class Residual(NamedTuple):
    """What is added to the residual stream before a norm, times a scale; None: nothing is."""

    added: Tensor | None
    scale: float


def add_and_norm(norm: nn.Module, x: Tensor, residual: Residual) -> tuple[Tensor, Tensor]:
    """Return the residual stream with the residual added, and its norm: at once where the norm does that."""
    if type(norm) in (LayerNorm, RMSNorm, UnitOffsetRMSNorm):
        return norm(x, residual)
    stream = residual_stream(x, residual)
    return stream, norm(stream)


def residual_stream(x: Tensor, residual: Residual) -> Tensor:
    """Return the residual stream with the residual added."""
    return x if residual.added is None else torch.add(x, residual.added, alpha=residual.scale)


class LayerNorm(nn.LayerNorm):
    """LayerNorm (Ba et al. 2016) over the last dimension."""

    def forward(self, x: Tensor, residual: Residual | None = None) -> Any:
        """Return the norm of x (..., size); with a residual, its sum with x, and the norm of that."""
        if residual is None:
            return norms.layer_norm(x, self.weight, self.bias, self.eps)
        return norms.add_and_layer_norm(x, *residual, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019); the mean square is taken in float32."""

    offset = 0.0  # added to the weight

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - self.offset))
        self.eps = eps

    def forward(self, x: Tensor, residual: Residual | None = None) -> Any:
        """Return the norm of x (..., size); with a residual, its sum with x, and the norm of that."""
        if residual is None:
            return norms.rms_norm(x, self.weight, self.eps, self.offset)
        return norms.add_and_rms_norm(x, *residual, self.weight, self.eps, self.offset)


class UnitOffsetRMSNorm(RMSNorm):
    """Gemma's RMSNorm, whose stored weight is the distance from 1."""

    offset = 1.0


class GroupedRMSNorm(RMSNorm):
    """RMSNorm of each of `groups` equal parts, with weights of its own for each."""

    def __init__(self, size: int, eps: float, groups: int) -> None:
        super().__init__(size, eps)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        parts = x.float().unflatten(-1, (self.groups, -1))
        return F.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2).to(x.dtype) * self.weight


class PlainRMSNorm(nn.Module):
    """RMSNorm without weights."""

    weight: Tensor | None

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.register_parameter("weight", None)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (self.size,), eps=self.eps).to(x.dtype)


NORMS: dict[str, Callable[..., nn.Module]] = {
    "LayerNorm": LayerNorm,
    "BiaslessLayerNorm": partial(LayerNorm, bias=False),
    "PlainLayerNorm": partial(LayerNorm, elementwise_affine=False),
    "RMSNorm": RMSNorm,
    "PlainRMSNorm": PlainRMSNorm,
    "UnitOffsetRMSNorm": UnitOffsetRMSNorm,
}


def norm(config: Config, size: int | None = None, name: str = "") -> nn.Module:
    """Return a new norm of the class that the config names, or of another, over n_embd or `size` elements."""
    name = name or config.norm_class
    if name not in NORMS:
        raise UserError(f"{config.name}: norm_class is {name!r}, expected one of {', '.join(NORMS)}")
    return NORMS[name](size or config.n_embd, eps=config.norm_eps)


class QKNorm(nn.Module):
    """Norms queries and keys (Dehghani et al. 2023), over the whole projections or over each head.

    Args:
        config: with the sizes of the layer.
        rows: of queries and of keys; 0 where a layer has none of its own.
    """

    def __init__(self, config: Config, rows: tuple[int, ...]) -> None:
        super().__init__()
        head_size = config.head_size
        self.widths = rows if config.qk_norm == "projection" else (head_size, head_size)
        self.q, self.k = (
            None if n == 0 else LayerNorms(n // head_size, head_size, config.norm_eps) if config.qk_norm == "heads"
            else norm(config, width, config.qk_norm_class)
            for n, width in zip(rows, self.widths, strict=True)
        )  # fmt: skip

    def forward(self, *qk: Tensor) -> tuple[Tensor, Tensor]:
        """Return normed queries and keys, of the shapes that they had: (B, T, heads * head_size)."""
        parts = zip((self.q, self.k), qk, self.widths, strict=True)
        # under autocast norms give float32, in which attention would be slow
        q, k = (
            x if norm is None else norm(x.unflatten(-1, (-1, width))).flatten(-2).to(x.dtype)
            for norm, x, width in parts
        )
        return q, k


class LayerNorms(nn.LayerNorm):
    """A LayerNorm for each of `n` heads, without bias; x: (..., n, size)."""

    def __init__(self, n: int, size: int, eps: float) -> None:
        super().__init__(size, eps=eps, elementwise_affine=False)
        self.weight = nn.Parameter(torch.ones(n * size))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, eps=self.eps) * self.weight.view(x.shape[-2:])
