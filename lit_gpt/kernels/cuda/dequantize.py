"""Writes a weight from its codes of 8 or 4 bits in one pass: the codes are read once, the weight is written once."""

from typing import NamedTuple

import torch
from torch import Tensor

from lit_gpt.kernels.cuda.language import jit, tl
from lit_gpt.kernels.cuda.launch import launch

GROUP = 64  # as lit_gpt.quantization.packing has it
GROUPS_AT_ONCE, COLUMNS_AT_ONCE = 32, 2048


class QuantizedWeight(NamedTuple):
    """The tensors of a quantized weight as the kernels read them, contiguous and on one device.

    Attributes:
        codes: int8 (rows, columns), or uint8 (rows, groups * 32) with two codes of 4 bits in each, the first in the
            upper half.
        scale: of each row (rows,), or of each group of 64 columns (rows, groups); of any floating dtype, or int8 codes
            of it if `absmax_scale` is given.
        zero: (rows, groups), what code 0 stands for; None: a code stands for a multiple of the scale.
        values: float32 (16,), what codes of 4 bits stand for before the scale; None: their numbers.
        absmax_scale: float32, the scale of each 256 of the codes in `scale` (Dettmers et al. 2023, QLoRA, double
            quantization).
        absmax_mean: float32 (1,), added to them.
        columns: of the weight, which may be fewer than the last group of a row has room for.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    values: Tensor | None
    absmax_scale: Tensor | None
    absmax_mean: Tensor | None
    columns: int

    @property
    def rows(self) -> int:
        return len(self.codes)

    @property
    def format(self) -> str:
        """Return by which of the kernels' formulas the codes are read."""
        if self.codes.dtype == torch.int8:
            return "int8"
        return "int4" if self.zero is not None else "nf4" if self.absmax_scale is None else "nf4-dq"


@jit
def group_scale(scale, absmax_scale, absmax_mean, groups, mask, FORMAT: tl.constexpr):
    """Return the scale of some groups, float32."""
    found = tl.load(scale + groups, mask, other=0.0).to(tl.float32)
    if FORMAT == "nf4-dq":
        found = found * tl.load(absmax_scale + groups // 256, mask, other=0.0) + tl.load(absmax_mean)
        found = tl.maximum(found, 0.0)
    return found


@jit
def code_values(codes, values, FORMAT: tl.constexpr):
    """Return what codes of 4 bits stand for before their group's scale, float32."""
    if FORMAT == "int4":
        found = codes.to(tl.float32)
    else:
        found = tl.load(values + codes.to(tl.uint32))  # of 64 bytes, which stay in the nearest cache
    return found


@jit
def dequantize_int8(codes, scale, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(codes + row * columns + at, at < columns, other=0).to(tl.float32) * tl.load(scale + row)
    tl.store(out + row * columns + at, weight.to(out.dtype.element_ty), at < columns)


@jit
def dequantize_four_bit(
    codes, scale, zero, values, absmax_scale, absmax_mean, out, n_groups, groups_of_row, columns,
    FORMAT: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write BLOCK groups. FULL: the last group of a row has all of its 64 columns."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = group < n_groups
    packed = tl.load(codes + group[:, None] * 32 + tl.arange(0, 32)[None, :], there[:, None], other=0)
    factor = group_scale(scale, absmax_scale, absmax_mean, group, there, FORMAT)[:, None]
    first, second = code_values(packed >> 4, values, FORMAT) * factor, code_values(packed & 15, values, FORMAT) * factor
    if FORMAT == "int4":
        offset = tl.load(zero + group, there, other=0.0).to(tl.float32)[:, None]
        first, second = first + offset, second + offset
    weight = tl.interleave(first, second).to(out.dtype.element_ty)
    of_group = tl.arange(0, 64)[None, :]
    if FULL:
        tl.store(out + group[:, None] * 64 + of_group, weight, there[:, None])
    else:
        column = (group % groups_of_row)[:, None] * 64 + of_group
        place = (group // groups_of_row)[:, None] * columns + column
        tl.store(out + place, weight, there[:, None] & (column < columns))


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Return the weight (rows, columns), computed in float32 and rounded once to `dtype`."""
    rows, columns, n_bytes = weight.rows, weight.columns, weight.codes.size(1)
    out = torch.empty(rows, columns, dtype=dtype, device=weight.codes.device)
    if weight.format == "int8":
        grid = rows, -(-columns // COLUMNS_AT_ONCE)
        launch(dequantize_int8, grid, weight.codes, weight.scale, out, columns, BLOCK=COLUMNS_AT_ONCE)
        return out
    groups = n_bytes * 2 // GROUP
    programs, sizes = -(-rows * groups // GROUPS_AT_ONCE), (rows * groups, groups, columns)
    full = columns == groups * GROUP
    tensors = *weight[:-1], out
    launch(dequantize_four_bit, (programs,), *tensors, *sizes, FORMAT=weight.format, FULL=full, BLOCK=GROUPS_AT_ONCE)
    return out
