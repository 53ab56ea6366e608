"""Embedding, norms, and low-rank updates of a few rows of float32, one new token each."""

import torch
from torch import Tensor

from lit_gpt.kernels.cuda.decoding.attention import element
from lit_gpt.kernels.cuda.language import jit, power_of_2, tl
from lit_gpt.kernels.cuda.launch import launch

COLUMNS = 256  # that a program has
INPUTS = 1024  # that it multiplies at a time


@jit
def embed_kernel(y, entries, table, scale, size, factor, ADDS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    entry = tl.maximum(tl.load(entries + row), 0)
    if scale is not None:
        factor *= tl.load(scale + entry).to(tl.float32)
    x = tl.load(table + entry * size + column, column < size, other=0).to(tl.float32) * factor
    to = y + row * size + column
    if ADDS:
        x += tl.load(to, column < size, other=0.0)
    tl.store(to, x, column < size)


def embed(y: Tensor, entries: Tensor, table: Tensor, scale: Tensor | None, factor: float, adds: bool) -> None:
    """Set y (rows, size) to `factor` times rows of a table, or add these.

    Args:
        entries: int64 (rows,), which; what is negative counts as 0.
        table: (entries, size), with a scale (entries,) if it is quantized.
    """
    grid = len(entries), -(-y.size(1) // COLUMNS)
    launch(embed_kernel, grid, y, entries, table, scale, y.size(1), factor, ADDS=adds, COLUMNS=COLUMNS)


@jit
def norm_kernel(
    y, x, weight, bias, y_stride, x_stride, size, stride, eps, offset, CENTERED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, part, at = tl.program_id(0), tl.program_id(1), tl.arange(0, BLOCK)
    inside = at < size
    found = tl.load(x + row * x_stride + part * size + at, inside, other=0.0)
    if CENTERED:
        found = tl.where(inside, found - tl.sum(found, 0) / size, 0.0)
    found *= tl.rsqrt(tl.sum(found * found, 0) / size + eps)
    if weight is not None:
        found *= tl.load(weight + part * stride + at, inside, other=0.0) + offset
    if bias is not None:
        found += tl.load(bias + at, inside, other=0.0)
    tl.store(y + row * y_stride + part * size + at, found, inside)


def norm(
    rows: int, y: Tensor, y_stride: int, x: Tensor, x_stride: int, parts: int, size: int, weight: Tensor | None,
    bias: Tensor | None, stride: int, eps: float, offset: float, centered: bool,
) -> None:  # fmt: skip
    """Norm each of the parts of x into y, which may be x: LayerNorm if it is centered, else RMSNorm.

    Args:
        y, x: their first rows; the next begin so many elements later.
        weight, bias: float32 (size,); the weights of a part begin `stride` elements after those of the one before.
        offset: added to the weight.
    """
    numbers, block = (y_stride, x_stride, size, stride, eps, offset), power_of_2(size)
    warps = min(16, max(1, block // 256))
    launch(norm_kernel, (rows, parts), y, x, weight, bias, *numbers, warps=warps, CENTERED=centered, BLOCK=block)


@jit
def up_kernel(y, low, B, size, ranks, first, rank, start, stop, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0), start + tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < stop
    total = tl.load(y + row * size + column, inside, other=0.0)
    for r in range(rank):
        factor = tl.load(low + row * ranks + first + r)
        total += factor * tl.load(B + r * (stop - start) + column - start, inside, other=0.0).to(tl.float32)
    tl.store(y + row * size + column, total, inside)


def lora_up(rows: int, y: Tensor, low: Tensor, first: int, B: Tensor, start: int, stop: int) -> None:
    """Add to the columns of y what B (rank, stop - start) makes of the ranks of `low` from `first` on."""
    numbers = y.size(1), low.size(1), first, len(B), start, stop
    launch(up_kernel, (rows, -(-(stop - start) // COLUMNS)), y, low, B, *numbers, COLUMNS=COLUMNS)


@jit
def update_of(addresses, row, layer):
    """Return the addresses of a row's A and B of a layer, and their rank, which is 0 if it has none."""
    address = tl.load(addresses + row)
    entry = address.to(tl.pointer_type(tl.int64)) + 3 * layer
    a, b = tl.load(entry, address != 0, other=0), tl.load(entry + 1, address != 0, other=0)
    return a, b, tl.load(entry + 2, address != 0, other=0)


@jit
def row_down_kernel(low, x, addresses, layer, ranks, columns, DTYPE: tl.constexpr, INPUTS: tl.constexpr):
    row, r = tl.program_id(0), tl.program_id(1)
    a, _, rank = update_of(addresses, row, layer)
    A = a.to(tl.pointer_type(DTYPE)) + r.to(tl.int64) * columns
    total = tl.zeros([INPUTS], tl.float32)
    for block in range(tl.cdiv(columns, INPUTS)):
        column = block * INPUTS + tl.arange(0, INPUTS)
        known = (column < columns) & (r < rank)
        total += tl.load(A + column, known, other=0.0).to(tl.float32) * tl.load(x + row * columns + column, known, 0.0)
    tl.store(low + row * ranks + r, tl.sum(total, 0))


@jit
def row_up_kernel(y, low, addresses, layer, ranks, size, DTYPE: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    _, b, rank = update_of(addresses, row, layer)
    B, inside = b.to(tl.pointer_type(DTYPE)), column < size
    total = tl.load(y + row * size + column, inside, other=0.0)
    for r in range(rank.to(tl.int32)):
        factor = tl.load(low + row * ranks + r)
        total += factor * tl.load(B + r * size + column, inside, other=0.0).to(tl.float32)
    tl.store(y + row * size + column, total, inside)


def row_lora_down(low: Tensor, x: Tensor, addresses: Tensor, layer: int, dtype: torch.dtype) -> None:
    """Set each row of `low` (rows, ranks) to what the A of its own update of a layer makes of x (rows, columns).

    Kernels that look up each row's matrices are those of Chen et al. 2023, Punica.

    Args:
        addresses: int64 (rows,), see lit_gpt.methods.decoding_tape.RowChoice; on the device, as what it leads to.
        dtype: of the updates.
    """
    grid, numbers = (len(addresses), low.size(1)), (layer, low.size(1), x.size(1))
    launch(row_down_kernel, grid, low, x, addresses, *numbers, DTYPE=element(dtype), INPUTS=INPUTS)


def row_lora_up(y: Tensor, low: Tensor, addresses: Tensor, layer: int, dtype: torch.dtype) -> None:
    """Add to each row of y (rows, size) what the B of its own update of a layer makes of `low`."""
    grid, numbers = (len(addresses), -(-y.size(1) // COLUMNS)), (layer, low.size(1), y.size(1))
    launch(row_up_kernel, grid, y, low, addresses, *numbers, DTYPE=element(dtype), COLUMNS=COLUMNS)


@jit
def noise_kernel(out, seeds, positions, size, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    seed, position = tl.load(seeds + row), tl.load(positions + row).to(tl.int32)
    place = column.to(tl.uint32)
    bits, _, _, _ = tl.philox(seed, place, position.to(tl.uint32) + place * 0, place * 0, place * 0)
    uniform = ((bits >> 8).to(tl.float32) + 0.5) * 2.0**-24  # neither 0 nor 1
    tl.store(out + row * size + column, -tl.log(uniform), column < size)


def exponential_noise(out: Tensor, seeds: Tensor, positions: Tensor) -> None:
    """Fill out (rows, size) with float32 numbers of the exponential distribution, which follow from seed and position.

    They are those of Philox 4x32 (Salmon et al. 2011), so that a row draws the same wherever it stands in a batch.

    Args:
        seeds, positions: int64 (rows,).
    """
    grid = len(seeds), -(-out.size(1) // COLUMNS)
    launch(noise_kernel, grid, out, seeds, positions, out.size(1), COLUMNS=COLUMNS)
