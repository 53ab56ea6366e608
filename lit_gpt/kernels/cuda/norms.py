"""LayerNorm (Ba et al. 2016) and RMSNorm (Zhang & Sennrich 2019), with the addition to the residual stream before them.

All is computed in float32 and rounded once.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lit_gpt.kernels.cuda.language import jit, power_of_2, tl
from lit_gpt.kernels.cuda.launch import launch

TILE = 4096  # elements that a program has at a time, at least a row
SHARES = 256  # of the rows, each of which sums gradients of the weight by itself


class Norm(NamedTuple):
    """Says which norm.

    Attributes:
        centered: whether each row's mean is subtracted, as LayerNorm does.
        offset: added to the weight.
    """

    eps: float
    centered: bool
    offset: float = 0.0


@jit
def norm_kernel(
    x, added, weight, bias, stream, y, means, inverses, rows, size, scale, eps, offset,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < size)[None, :]
    at = row.to(tl.int64)[:, None] * size + column[None, :]
    wide = tl.load(x + at, inside, 0.0).to(tl.float32)
    if added is not None:
        total = (wide + scale * tl.load(added + at, inside, 0.0).to(tl.float32)).to(stream.dtype.element_ty)
        tl.store(stream + at, total, inside)
        wide = total.to(tl.float32)  # the norm sees what the stream keeps
    if CENTERED:
        mean = tl.sum(wide, 1) / size
        tl.store(means + row, mean, row < rows)
        wide = tl.where(inside, wide - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(wide * wide, 1) / size + eps)
    tl.store(inverses + row, inverse, row < rows)
    wide *= inverse[:, None]
    if weight is not None:
        wide *= offset + tl.load(weight + column, column < size, 0.0).to(tl.float32)[None, :]
    if bias is not None:
        wide += tl.load(bias + column, column < size, 0.0).to(tl.float32)[None, :]
    tl.store(y + at, wide.to(y.dtype.element_ty), inside)


@jit
def norm_backward_kernel(
    grad, stream_grad, x, weight, means, inverses, x_grad, weight_grads, bias_grads, rows, size, offset, steps,
    CENTERED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    share, column = tl.program_id(0), tl.arange(0, BLOCK)
    factor = tl.full([BLOCK], 1.0, tl.float32)
    if weight is not None:
        factor = offset + tl.load(weight + column, column < size, 0.0).to(tl.float32)
    weight_total, bias_total = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for step in range(steps):
        row = (share * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < size)[None, :]
        at = row.to(tl.int64)[:, None] * size + column[None, :]
        slope = tl.load(grad + at, inside, 0.0).to(tl.float32)
        wide = tl.load(x + at, inside, 0.0).to(tl.float32)
        inverse = tl.load(inverses + row, row < rows, 0.0)[:, None]
        if CENTERED:
            wide = tl.where(inside, wide - tl.load(means + row, row < rows, 0.0)[:, None], 0.0)
        normed = wide * inverse
        if weight_grads is not None:
            weight_total += tl.sum(slope * normed, 0)
        if bias_grads is not None:
            bias_total += tl.sum(slope, 0)
        slope *= factor[None, :]
        total = slope - normed * (tl.sum(slope * normed, 1) / size)[:, None]
        if CENTERED:
            total -= (tl.sum(slope, 1) / size)[:, None]
        total *= inverse
        if stream_grad is not None:
            total += tl.load(stream_grad + at, inside, 0.0).to(tl.float32)
        tl.store(x_grad + at, total.to(x_grad.dtype.element_ty), inside)
    if weight_grads is not None:
        tl.store(weight_grads + share * size + column, weight_total, column < size)
    if bias_grads is not None:
        tl.store(bias_grads + share * size + column, bias_total, column < size)


def norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: Norm, added: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Norm x + scale * added, or x.

    Args:
        x, added: (..., size), contiguous.
        weight, bias: (size,) or None.

    Returns:
        What is normed and the normed, both like x; the means, float32, one of each row, or None; and the inverses of
        the deviations, or of the root mean squares, float32.
    """
    size = x.size(-1)
    rows = x.numel() // size
    y, stream = torch.empty_like(x), None if added is None else torch.empty_like(x)
    inverses = x.new_empty(rows, dtype=torch.float32)
    means = torch.empty_like(inverses) if kind.centered else None
    BLOCK, ROWS, warps = _tile(size)
    tensors = x, added, weight, bias, stream, y, means, inverses
    numbers = rows, size, scale, kind.eps, kind.offset
    grid = (-(-rows // ROWS),)
    launch(norm_kernel, grid, *tensors, *numbers, warps=warps, CENTERED=kind.centered, ROWS=ROWS, BLOCK=BLOCK)
    return x if stream is None else stream, y, means, inverses


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, means: Tensor | None, inverses: Tensor, kind: Norm,
    stream_grad: Tensor | None = None, weight_trains: bool = False, bias_trains: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of what is normed, with `stream_grad` added, and of weight and bias, where they train.

    Args:
        grad, x: (..., size), contiguous; x is what is normed. `norm` describes the rest.
    """
    size = x.size(-1)
    rows = x.numel() // size
    BLOCK, ROWS, warps = _tile(size)
    tiles = -(-rows // ROWS)
    shares = min(tiles, SHARES) if weight_trains or bias_trains else tiles
    steps = -(-tiles // shares) if shares else 0
    x_grad = torch.empty_like(x)
    sums = [
        x.new_empty(shares, size, dtype=torch.float32) if trains else None for trains in (weight_trains, bias_trains)
    ]
    tensors = grad, stream_grad, x, weight, means, inverses, x_grad, *sums
    numbers = rows, size, kind.offset, steps
    constants = {"CENTERED": kind.centered, "ROWS": ROWS, "BLOCK": BLOCK}
    launch(norm_backward_kernel, (shares,), *tensors, *numbers, warps=warps, **constants)
    weight_grad, bias_grad = (None if x is None else x.sum(0) for x in sums)
    return x_grad, weight_grad, bias_grad


def _tile(size: int) -> tuple[int, int, int]:
    """Return how wide and how high a tile of rows is, and how many warps have it."""
    block = power_of_2(size)
    return block, max(1, TILE // block // 4), min(16, max(4, block // 512))
