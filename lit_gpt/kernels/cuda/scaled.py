"""Elementwise work over rows: the sum of three, and a scale and a shift for each column, computed in float32."""

import torch
from torch import Tensor

from lit_gpt.kernels.cuda.language import jit, tl
from lit_gpt.kernels.cuda.launch import launch

BLOCK = 1024
COLUMNS = 128  # of a tile
ROWS = 16
SHARES = 64  # of the rows, each of which sums gradients of the columns by itself


@jit
def sum_kernel(a, b, c, y, count, BLOCK: tl.constexpr):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(a + at, at < count, 0.0).to(tl.float32) + tl.load(b + at, at < count, 0.0).to(tl.float32)
    total += tl.load(c + at, at < count, 0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), at < count)


@jit
def scale_kernel(x, scale, shift, y, rows, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at, inside = row.to(tl.int64)[:, None] * size + column[None, :], (row < rows)[:, None] & (column < size)[None, :]
    factor, added = tl.load(scale + column, column < size, 0.0), tl.load(shift + column, column < size, 0.0)
    value = (tl.load(x + at, inside, 0.0).to(tl.float32) + added[None, :]) * factor[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), inside)


@jit
def scale_backward_kernel(
    grad, x, scale, shift, x_grad, scale_grads, shift_grads, rows, size, steps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column, share = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.program_id(1)
    factor, added = tl.load(scale + column, column < size, 0.0), tl.load(shift + column, column < size, 0.0)
    along, total = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for step in range(steps):
        row = (share * steps + step) * ROWS + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * size + column[None, :]
        inside = (row < rows)[:, None] & (column < size)[None, :]
        slope = tl.load(grad + at, inside, 0.0).to(tl.float32)
        value = tl.load(x + at, inside, 0.0).to(tl.float32)
        along += tl.sum(slope * (value + added[None, :]), 0)
        total += tl.sum(slope, 0)
        tl.store(x_grad + at, (slope * factor[None, :]).to(x_grad.dtype.element_ty), inside)
    tl.store(scale_grads + share * size + column, along, column < size)
    tl.store(shift_grads + share * size + column, total * factor, column < size)


def sum_of_three(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return a + b + c, contiguous and of one shape, rounded once."""
    y = torch.empty_like(a)
    launch(sum_kernel, (-(-a.numel() // BLOCK),), a, b, c, y, a.numel(), BLOCK=BLOCK)
    return y


def scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return scale * (x + shift); x: (..., size), contiguous, scale, shift: float32 (size,)."""
    y, size = torch.empty_like(x), x.size(-1)
    rows = x.numel() // size
    grid = -(-rows // ROWS), -(-size // COLUMNS)
    launch(scale_kernel, grid, x, scale, shift, y, rows, size, ROWS=ROWS, COLUMNS=COLUMNS)
    return y


def scaled_backward(grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, scale and shift; grad and x are contiguous."""
    x_grad, size = torch.empty_like(x), x.size(-1)
    rows = x.numel() // size
    steps = -(-rows // (ROWS * SHARES))
    shares = -(-rows // (ROWS * max(1, steps)))
    sums = scale.new_empty(2, shares, size)
    grid = -(-size // COLUMNS), shares
    tensors = grad, x, scale, shift, x_grad, sums[0], sums[1]
    launch(scale_backward_kernel, grid, *tensors, rows, size, steps, ROWS=ROWS, COLUMNS=COLUMNS)
    scale_grad, shift_grad = sums.sum(1)
    return x_grad, scale_grad, shift_grad
