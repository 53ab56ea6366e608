"""LoRA's update of a linear layer's output (Hu et al. 2021), forward and backward.

What dropout drops is computed again wherever x is read, see lit_gpt.kernels.dropout, so that no mask is in memory. Each
pass over a large matrix does all that is to be done with it; where many programs add to one result, each leaves its
part, and the parts are summed in a fixed order.

Columns of y that are updated are counted one part after the other, as the rows of B are.
"""

from typing import Any

import torch
from torch import Tensor

from lit_gpt.kernels.cuda.dropout import stays
from lit_gpt.kernels.cuda.language import jit, power_of_2, tl
from lit_gpt.kernels.cuda.launch import launch

MAX_RANKS = 128  # of all parts, beyond which a tile's sums would not fit a program's registers
PROGRAMS = 512  # into so many a matrix is cut, about four for each multiprocessor of a large GPU


@jit
def places(index, PARTS: tl.constexpr):
    """Return the column of y and the part of each updated column."""
    column, part, row = index, index * 0, 0
    for p in tl.static_range(len(PARTS)):
        column = tl.where(index >= row, index - row + PARTS[p][0], column)
        part = tl.where(index >= row, p, part)
        row += PARTS[p][1] - PARTS[p][0]
    return column, part


@jit
def factor_tile(B, index, part, rank, count, factor, R: tl.constexpr):  # fmt: skip
    """Return (updated columns, ranks of all parts) of B, scaled, with zero where a rank is another part's."""
    own = (index < count)[:, None] & (rank[None, :] // R == part[:, None])
    return tl.load(B + index[:, None] * R + (rank[None, :] - part[:, None] * R), own, 0.0) * factor


@jit
def lora_down_kernel(
    x, A, keys, low, rows, size, kept, ranks, RANKS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    row, rank = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, RANKS)
    total = tl.zeros([BLOCK_T, RANKS], tl.float32)
    for start in range(0, size, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = (row < rows)[:, None] & (column < size)[None, :]
        tile = tl.load(x + row.to(tl.int64)[:, None] * size + column[None, :], inside, 0.0)
        if keys is not None:
            tile = tl.where(stays(keys, row, row < rows, column, kept), tile, 0.0)
        within = (column < size)[:, None] & (rank < ranks)[None, :]
        a = tl.load(A + rank[None, :] * size + column[:, None], within, 0.0).to(tile.dtype)
        total = tl.dot(tile, a, total, input_precision="tf32x3")
    tl.store(low + row[:, None] * ranks + rank[None, :], total, (row < rows)[:, None] & (rank < ranks)[None, :])


@jit
def lora_up_kernel(
    y, low, B, rows, width, count, ranks, factor,
    PARTS: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, rank = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, RANKS)
    index = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column, part = places(index, PARTS)
    dtype = y.dtype.element_ty
    b = factor_tile(B, index, part, rank, count, factor, R).to(dtype)
    known = (row < rows)[:, None] & (rank < ranks)[None, :]
    lower = tl.load(low + row[:, None] * ranks + rank[None, :], known, 0.0).to(dtype)
    at = y + row.to(tl.int64)[:, None] * width + column[None, :]
    inside = (row < rows)[:, None] & (index < count)[None, :]
    total = tl.dot(lower, tl.trans(b), tl.load(at, inside, 0.0).to(tl.float32), input_precision="tf32x3")
    tl.store(at, total.to(dtype), inside)


@jit
def lora_grad_kernel(
    grad, low, B, low_grads, B_grads, rows, width, count, ranks, factor, steps,
    PARTS: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, share, rank = tl.program_id(0), tl.program_id(1), tl.arange(0, RANKS)
    index = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column, part = places(index, PARTS)
    dtype = grad.dtype.element_ty
    b = factor_tile(B, index, part, rank, count, factor, R).to(dtype)
    B_total = tl.zeros([BLOCK_N, RANKS], tl.float32)
    for step in range(steps):
        row = (share * steps + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (row < rows)[:, None] & (index < count)[None, :]
        slope = tl.load(grad + row.to(tl.int64)[:, None] * width + column[None, :], inside, 0.0)
        known = (row < rows)[:, None] & (rank < ranks)[None, :]
        at = row[:, None] * ranks + rank[None, :]
        lower = tl.load(low + at, known, 0.0).to(dtype)
        tl.store(low_grads + tile.to(tl.int64) * rows * ranks + at, tl.dot(slope, b, input_precision="tf32x3"), known)
        B_total = tl.dot(tl.trans(slope), lower, B_total, input_precision="tf32x3")
    own = (index < count)[:, None] & (rank[None, :] // R == part[:, None])
    at = (share * count + index)[:, None] * R + (rank[None, :] - part[:, None] * R)
    tl.store(B_grads + at, B_total * factor, own)


@jit
def lora_input_kernel(
    x, A, keys, low_grad, x_grad, A_grads, rows, size, kept, ranks, steps,
    RANKS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    column, share, rank = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1), tl.arange(0, RANKS)
    dtype = x_grad.dtype.element_ty
    within = (rank < ranks)[:, None] & (column < size)[None, :]
    at = rank[:, None] * size + column[None, :]
    a = tl.load(A + at, within, 0.0).to(dtype)
    A_total = tl.zeros([RANKS, BLOCK_N], tl.float32)
    for step in range(steps):
        row = (share * steps + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        known, inside = (
            (row < rows)[:, None] & (rank < ranks)[None, :],
            (row < rows)[:, None] & (column < size)[None, :],
        )
        lower = tl.load(low_grad + row[:, None] * ranks + rank[None, :], known, 0.0).to(dtype)
        slope = tl.dot(lower, a, input_precision="tf32x3").to(dtype)
        cell = row.to(tl.int64)[:, None] * size + column[None, :]
        if keys is not None:
            there = stays(keys, row, row < rows, column, kept)
            slope = tl.where(there, slope, 0.0)
        tl.store(x_grad + cell, slope, inside)
        if A_grads is not None:
            tile = tl.load(x + cell, inside, 0.0)
            if keys is not None:
                tile = tl.where(there, tile, 0.0)
            A_total = tl.dot(tl.trans(lower), tile, A_total, input_precision="tf32x3")
    if A_grads is not None:
        tl.store(A_grads + share * ranks * size + at, A_total, within)


def supports_lora(y: Tensor, x: Tensor, A: Tensor) -> bool:
    """Return whether these kernels take such tensors, which `lit_gpt.kernels.cuda.launch.serves`."""
    return len(A) <= MAX_RANKS and len(x) > 0 and y.is_contiguous() and x.is_contiguous()


def lora_(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, keys: Tensor | None, kept: int,
    starts: list[int], stops: list[int], factor: float,
) -> Tensor:  # fmt: skip
    """Add the update to y in place; return dropout(x) A^T, float32 (T, ranks of all parts).

    The arguments are those of lit_gpt.kernels.ops.lora_.
    """
    (rows, size), ranks, count, r = x.shape, len(A), len(B), B.size(1)
    low = x.new_empty(rows, ranks, dtype=torch.float32)
    A, B = A.contiguous(), B.contiguous()
    tile = {"RANKS": _ranks(ranks), "BLOCK_T": 32}
    sizes, deep = (rows, size, kept, ranks), _wide(x, 128 if ranks <= 32 else 64)
    launch(lora_down_kernel, (-(-rows // 32),), x, A, keys, low, *sizes, **tile, BLOCK_K=deep)
    parts = tuple(zip(starts, stops, strict=True))
    numbers, width = (rows, y.size(1), count, ranks, factor), _wide(y, 128 if ranks <= 64 else 64)
    grid = -(-rows // 32), -(-count // width)
    launch(lora_up_kernel, grid, y, low, B, *numbers, PARTS=parts, R=r, **tile, BLOCK_N=width)
    return low


def lora_backward(
    grad: Tensor, x: Tensor | None, A: Tensor, B: Tensor, keys: Tensor | None, kept: int,
    starts: list[int], stops: list[int], factor: float, low: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, through the update alone, of A, which is empty without x, and of B.

    The arguments are those of lit_gpt.kernels.ops.lora_backward.
    """
    rows, (ranks, size), (count, r) = len(grad), A.shape, B.shape
    A, B = A.contiguous(), B.contiguous()
    width = _wide(grad, min(256, max(32, 4096 // _ranks(ranks))))
    tile: dict[str, Any] = {"RANKS": _ranks(ranks), "BLOCK_T": 32, "BLOCK_N": width}

    tiles, shares, steps = _shares(count, width, rows)
    low_grads = grad.new_empty(tiles, rows, ranks, dtype=torch.float32)
    B_grads = grad.new_empty(shares, count, r, dtype=torch.float32)
    numbers = rows, grad.size(1), count, ranks, factor, steps
    parts = tuple(zip(starts, stops, strict=True))
    launch(lora_grad_kernel, (tiles, shares), grad, low, B, low_grads, B_grads, *numbers, PARTS=parts, R=r, **tile)
    low_grad = low_grads.sum(0)

    tile["BLOCK_N"] = width = width // 2 if width > 32 else width
    tiles, shares, steps = _shares(size, width, rows)
    x_grad = grad.new_empty(rows, size)
    A_grads = None if x is None else grad.new_empty(shares, ranks, size, dtype=torch.float32)
    tensors = x, A, keys, low_grad, x_grad, A_grads
    launch(lora_input_kernel, (tiles, shares), *tensors, rows, size, kept, ranks, steps, **tile)
    return x_grad, A.new_empty(0) if A_grads is None else A_grads.sum(0).to(A.dtype), B_grads.sum(0).to(B.dtype)


def _ranks(ranks: int) -> int:
    """Return the ranks of a tile; products want at least 16."""
    return max(16, power_of_2(ranks))


def _wide(x: Tensor, block: int) -> int:
    """Return how many columns a tile has, given how many of 16 bits."""
    return block * 2 // x.element_size()


def _shares(columns: int, block: int, rows: int) -> tuple[int, int, int]:
    """Return how many tiles the columns have, in how many shares the rows are cut, and the steps of 32 in each."""
    tiles, steps = -(-columns // block), -(-rows // 32)
    each = -(-steps // max(1, PROGRAMS // tiles))
    return tiles, -(-steps // each), each
