"""Products of one row or a few with a weight, which is read once as it is stored: full, or in codes of 8 or 4 bits.

They are bound by reading the weight. One row is multiplied element by element, in float32; few rows by tiles on the
tensor cores. What follows the product in a decoder is part of it: bias, activation, gate, addition to the residual
stream; so may be the RMSNorm before it, for which every program goes over the rows once more. Where a weight has fewer
rows than fill the device, several programs share its columns (split K); the last to come adds their sums, always in the
same order.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lit_gpt.kernels.cuda.dequantize import QuantizedWeight, code_values, group_scale
from lit_gpt.kernels.cuda.language import jit, power_of_2, tl
from lit_gpt.kernels.cuda.launch import launch

FEW_ROWS = 32  # more are worth a dequantized weight and a plain product
PROGRAMS = 528  # four for each multiprocessor of an H100, so that loads are under way while others wait
TILES = 2**16  # at most, of one product whose columns are shared


class Epilogue(NamedTuple):
    """Says what follows a product.

    Attributes:
        bias: (rows of the weight,), any floating dtype.
        activation: its name, of those of `activate`; applied before the gate.
        gated: whether the weight's second half of rows makes what the activated first half is multiplied with.
        residual: (M, outputs), to which `scale` times the result is added; may be the output itself.
    """

    bias: Tensor | None = None
    activation: str | None = None
    gated: bool = False
    residual: Tensor | None = None
    scale: float = 1.0


class InputNorm(NamedTuple):
    """Says how rows are normed before they are multiplied: by RMSNorm, times `gain`, float32 (columns,)."""

    gain: Tensor
    eps: float


@jit
def activate(x, NAME: tl.constexpr):
    """Return an activation of x, float32."""
    if NAME == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "silu":
        x = x * tl.sigmoid(x)
    elif NAME == "relu":
        x = tl.maximum(x, 0.0)
    elif NAME == "relu2":
        x = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    return x


@jit
def inverse_rms(x, row, given, columns, eps, INPUTS: tl.constexpr, WIDTH: tl.constexpr):
    """Return what RMSNorm multiplies rows of x by, float32 (INPUTS,)."""
    total = tl.zeros([INPUTS, WIDTH], tl.float32)
    for start in range(0, columns, WIDTH):
        column = start + tl.arange(0, WIDTH)
        inside = given[:, None] & (column < columns)[None, :]
        found = tl.load(x + row[:, None] * columns + column[None, :], inside, other=0.0).to(tl.float32)
        total += found * found
    return tl.rsqrt(tl.sum(total, 1) / columns + eps)


@jit
def normed(rows, gain, inverse, column, columns):
    """Return columns of rows, normed if there is a gain."""
    if gain is not None:
        rows = rows.to(tl.float32) * inverse * tl.load(gain + column, column < columns, other=0.0)
    return rows


@jit
def row_product(
    x, gain, inverse, codes, scale, row, there, columns, stored, first, last,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the products (1, ROWS) of one row x with some rows of a weight, over its blocks of columns."""
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in range(first, last):
        column = block * BLOCK + tl.arange(0, BLOCK)
        inside = column < columns
        given = normed(tl.load(x + column, inside, other=0.0).to(tl.float32), gain, inverse, column, columns)
        place = row[:, None] * stored + column[None, :]
        total += given[None, :] * tl.load(codes + place, there[:, None] & inside[None, :], other=0).to(tl.float32)
    product = tl.sum(total, 1)
    if FORMAT == "int8":
        product *= tl.load(scale + row, there, other=0.0).to(tl.float32)
    return product[None, :]


@jit
def nibble(words, values, SHIFT: tl.constexpr, FORMAT: tl.constexpr):
    """Return what the 4 bits from SHIFT on of each word, uint32, stand for before their group's scale, float32."""
    if FORMAT == "int4":  # put into the last bits of 2^23, which takes fewer instructions than to convert them
        PLACE: tl.constexpr = SHIFT % 16
        bits = ((words >> SHIFT - PLACE) & (15 << PLACE)) | 0x4B000000
        found = bits.to(tl.float32, bitcast=True) * 2.0**-PLACE - 2.0 ** (23 - PLACE)
    else:
        found = code_values(words >> SHIFT & 15, values, FORMAT)
    return found


@jit
def byte_part(words, upper, lower, values, BYTE: tl.constexpr, FORMAT: tl.constexpr):
    """Return what the two codes in a byte of each word are times two elements of the input."""
    first = nibble(words, values, 8 * BYTE + 4, FORMAT) * upper[None, :]
    return first + nibble(words, values, 8 * BYTE, FORMAT) * lower[None, :]


@jit
def row_product_four_bit(
    x, gain, inverse, words, scale, zero, values, absmax_scale, absmax_mean, row, there, columns, stored, first, last,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the products of one row x with rows of codes of 4 bits, 8 in each of `stored` words; see `row_product`.

    The parameters of a group enter once for each word, with the sum of its products.
    """
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in range(first, last):
        column = block * 8 * BLOCK + tl.arange(0, 8 * BLOCK)
        given = tl.load(x + column, column < columns, other=0.0).to(tl.float32)
        given = normed(given, gain, inverse, column, columns)
        even, odd = tl.split(tl.reshape(given, [BLOCK, 2, 2, 2]))  # by the place of the byte in its word
        even_0, even_1 = tl.split(even)
        odd_0, odd_1 = tl.split(odd)
        x_0, x_4 = tl.split(even_0)
        x_1, x_5 = tl.split(odd_0)
        x_2, x_6 = tl.split(even_1)
        x_3, x_7 = tl.split(odd_1)
        word = block * BLOCK + tl.arange(0, BLOCK)
        known = there[:, None] & (word < stored)[None, :]
        place = row[:, None] * stored + word[None, :]
        if FORMAT != "int4":  # a word for each thread, which looks its codes up: else they would change hands before
            place = tl.max_contiguous(place, [1, 1])
        found = tl.load(words + place, known, other=0).to(tl.uint32, bitcast=True)
        part = byte_part(found, x_0, x_1, values, 0, FORMAT) + byte_part(found, x_2, x_3, values, 1, FORMAT)
        part += byte_part(found, x_4, x_5, values, 2, FORMAT) + byte_part(found, x_6, x_7, values, 3, FORMAT)
        group = row[:, None] * (stored // 8) + (word // 8)[None, :]
        total += part * group_scale(scale, absmax_scale, absmax_mean, group, known, FORMAT)
        if FORMAT == "int4":
            inputs = (x_0 + x_1) + (x_2 + x_3) + ((x_4 + x_5) + (x_6 + x_7))
            total += tl.load(zero + group, known, other=0.0).to(tl.float32) * inputs[None, :]
    return tl.sum(total, 1)[None, :]


@jit
def few_rows_product(
    x, gain, inverse, codes, scale, zero, values, absmax_scale, absmax_mean, given_row, given, row, there, columns,
    stored, first, last, FORMAT: tl.constexpr, INPUTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Return the products (INPUTS, ROWS) of a few rows of x with some rows of a weight; see `row_product`."""
    total = tl.zeros([INPUTS, ROWS], tl.float32)
    at = tl.arange(0, BLOCK)
    for block in range(first, last):
        if FORMAT == "full" or FORMAT == "int8":
            column = block * BLOCK + at
            inside = (column < columns)[None, :]
            rows = tl.load(x + given_row[:, None] * columns + column[None, :], given[:, None] & inside, other=0.0)
            rows = normed(rows, gain, inverse, column[None, :], columns)
            weight = tl.load(codes + row[:, None] * stored + column[None, :], there[:, None] & inside, other=0)
            total = tl.dot(rows.to(DTYPE), tl.trans(weight.to(DTYPE)), total, input_precision="ieee")
        else:
            GROUPS: tl.constexpr = BLOCK // 32
            column = block * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
            place = given_row[:, None] * columns + column[None, :]
            rows = tl.load(x + place, given[:, None] & (column < columns)[None, :], other=0.0)
            rows = normed(rows, gain, inverse, column[None, :], columns).to(DTYPE)
            even, odd = tl.split(tl.reshape(rows, [INPUTS, BLOCK, 2]))
            byte = block * BLOCK + at
            known = there[:, None] & (byte < stored)[None, :]
            packed = tl.load(codes + row[:, None] * stored + byte[None, :], known, other=0)
            group = block * GROUPS + tl.arange(0, GROUPS)
            known = there[:, None] & (group < stored // 32)[None, :]
            group = row[:, None] * (stored // 32) + group[None, :]
            factor = group_scale(scale, absmax_scale, absmax_mean, group, known, FORMAT)[:, :, None]
            upper = tl.reshape(code_values(packed >> 4, values, FORMAT), [ROWS, GROUPS, 32]) * factor
            lower = tl.reshape(code_values(packed & 15, values, FORMAT), [ROWS, GROUPS, 32]) * factor
            if FORMAT == "int4":
                offset = tl.load(zero + group, known, other=0.0).to(tl.float32)[:, :, None]
                upper, lower = upper + offset, lower + offset
            upper, lower = tl.reshape(upper, [ROWS, BLOCK]).to(DTYPE), tl.reshape(lower, [ROWS, BLOCK]).to(DTYPE)
            total = tl.dot(even, tl.trans(upper), total, input_precision="ieee")
            total = tl.dot(odd, tl.trans(lower), total, input_precision="ieee")
    if FORMAT == "int8":
        total *= tl.load(scale + row, there, other=0.0).to(tl.float32)[None, :]
    return total


@jit
def any_product(
    x, gain, inverse, codes, scale, zero, values, absmax_scale, absmax_mean, given_row, given, row, there, columns,
    stored, first, last, FORMAT: tl.constexpr, INPUTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Return products, float32 (INPUTS, ROWS)."""
    if INPUTS > 1:
        product = few_rows_product(
            x, gain, inverse, codes, scale, zero, values, absmax_scale, absmax_mean, given_row, given, row, there,
            columns, stored, first, last, FORMAT, INPUTS, ROWS, BLOCK, DTYPE,
        )  # fmt: skip
    elif FORMAT == "full" or FORMAT == "int8":
        product = row_product(
            x, gain, inverse, codes, scale, row, there, columns, stored, first, last, FORMAT, ROWS, BLOCK,
        )  # fmt: skip
    else:
        product = row_product_four_bit(
            x, gain, inverse, codes, scale, zero, values, absmax_scale, absmax_mean, row, there, columns, stored,
            first, last, FORMAT, ROWS, BLOCK,
        )  # fmt: skip
    return product


@jit
def finish(
    product, second, bias, residual, y, row, output, outputs, factor, mask,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Write what becomes of products, float32, with the epilogue."""
    if bias is not None:
        product += tl.load(bias + output, output < outputs, other=0.0).to(tl.float32)[None, :]
        if GATED:
            second += tl.load(bias + outputs + output, output < outputs, other=0.0).to(tl.float32)[None, :]
    product = activate(product, ACTIVATION)
    if GATED:
        product *= second
    place = row[:, None] * outputs + output[None, :]
    if residual is not None:
        product = tl.load(residual + place, mask, other=0.0).to(tl.float32) + factor * product
    tl.store(y + place, product.to(y.dtype.element_ty), mask)


@jit
def gemv_kernel(
    x, gain, codes, scale, zero, values, absmax_scale, absmax_mean, bias, residual, y, sums, counts,
    m, columns, outputs, stored, blocks, factor, eps,
    FORMAT: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, DTYPE: tl.constexpr,
    INPUTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute ROWS outputs of INPUTS rows; `stored`: elements of `codes` in a row, in `blocks` blocks."""
    tile, share = tl.program_id(0), tl.program_id(1)
    output = tile * ROWS + tl.arange(0, ROWS)
    row = tl.program_id(2) * INPUTS + tl.arange(0, INPUTS)
    there, given, wide = output < outputs, row < m, output.to(tl.int64)
    first, last = share * blocks // SPLITS, (share + 1) * blocks // SPLITS
    inverse = 1.0
    if gain is not None:
        inverse = inverse_rms(x, row, given, columns, eps, INPUTS, WIDTH)
        if INPUTS > 1:
            inverse = inverse[:, None]
    product = any_product(
        x, gain, inverse, codes, scale, zero, values, absmax_scale, absmax_mean, row, given, wide, there, columns,
        stored, first, last, FORMAT, INPUTS, ROWS, BLOCK, DTYPE,
    )  # fmt: skip
    second = product
    if GATED:
        second = any_product(
            x, gain, inverse, codes, scale, zero, values, absmax_scale, absmax_mean, row, given, wide + outputs, there,
            columns, stored, first, last, FORMAT, INPUTS, ROWS, BLOCK, DTYPE,
        )  # fmt: skip
    mask = given[:, None] & there[None, :]
    if SPLITS == 1:
        finish(product, second, bias, residual, y, row, output, outputs, factor, mask, ACTIVATION, GATED)
    else:
        HALVES: tl.constexpr = 2 if GATED else 1
        here = sums + row[:, None] * outputs + output[None, :]
        of_all = m * outputs  # elements of a share's half
        tl.store(here + share * HALVES * of_all, product, mask)
        if GATED:
            tl.store(here + (share * HALVES + 1) * of_all, second, mask)
        tl.debug_barrier()  # so that all of this program's sums are written when it counts itself
        count = counts + tl.program_id(2) * tl.num_programs(0) + tile
        if tl.atomic_add(count, 1, sem="acq_rel") == SPLITS - 1:
            product, second = tl.zeros([INPUTS, ROWS], tl.float32), tl.zeros([INPUTS, ROWS], tl.float32)
            for other in range(SPLITS):  # not from the nearest cache, which may hold what was there before
                product += tl.load(here + other * HALVES * of_all, mask, other=0.0, cache_modifier=".cg")
                if GATED:
                    second += tl.load(here + (other * HALVES + 1) * of_all, mask, other=0.0, cache_modifier=".cg")
            finish(product, second, bias, residual, y, row, output, outputs, factor, mask, ACTIVATION, GATED)
            tl.store(count, 0)


def gemv(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    epilogue: Epilogue = Epilogue(),  # noqa: B008 (frozen)
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    norm: InputNorm | None = None,
) -> Tensor:
    """Return x W^T and what the epilogue makes of it.

    Args:
        x: (M, columns), contiguous.
        weight: (rows, columns), contiguous.
        out: (M, outputs), contiguous, to write to; outputs are half the rows if the epilogue is gated. None: a new one,
            in x's dtype.
        dtype: of the products of several rows; None: x's. Sums are float32.
        norm: of x; None: none.

    Returns:
        (M, outputs).
    """
    m, columns = x.shape
    codes: Any = weight
    params: list[Tensor | None] = [None] * 5
    format = "full"
    if isinstance(weight, QuantizedWeight):
        codes, params, format = weight.codes, list(weight[1:-1]), weight.format
    if m == 1 and codes.dtype == torch.uint8:
        codes = codes.view(torch.int32)
    outputs = len(codes) // (2 if epilogue.gated else 1)
    y = x.new_empty(m, outputs) if out is None else out
    dtype = dtype or x.dtype
    shape = launch_shape(m, outputs, codes, epilogue.gated, dtype, norm is not None)
    tiles, parts = -(-outputs // shape["ROWS"]), -(-m // shape["INPUTS"])
    sums = counts = None
    if (splits := shape["SPLITS"]) > 1:
        sums = x.new_empty(splits * (2 if epilogue.gated else 1) * m * outputs, dtype=torch.float32)
        counts = counters(x)
    gain, eps = norm or (None, 0.0)
    arguments = x, gain, codes, *params, epilogue.bias, epilogue.residual, y, sums, counts
    sizes = m, columns, outputs, codes.size(1), -(-codes.size(1) // shape["BLOCK"]), epilogue.scale, eps
    form = {"FORMAT": format, "ACTIVATION": epilogue.activation, "GATED": epilogue.gated}
    # for its norm a row is read at once, of several rows a part at a time
    width = 1 if norm is None else min(4096, power_of_2(columns)) if m == 1 else shape["BLOCK"]
    constants = form | shape | {"DTYPE": dot_dtype(dtype), "WIDTH": width}
    # values that are looked up are not to be fetched ahead one by one; else what keeps registers from being spilled
    looked_up = params[2] is not None
    stages = 3 if m == 1 or not (looked_up or format == "int4" and norm) else 1 if looked_up else 2
    warps = 8 if m > 1 and format != "full" else 4
    launch(gemv_kernel, (tiles, splits, parts), *arguments, *sizes, warps=warps, stages=stages, **constants)
    return y


def launch_shape(
    m: int, outputs: int, codes: Tensor, gated: bool, dtype: torch.dtype, normed: bool = False
) -> dict[str, Any]:
    """Return how many rows of x and of the weight a program has, how wide its blocks are, and who shares columns.

    Products of several rows, of a dtype, have fewer where they would spill registers.
    """
    stored, bits = codes.size(1), 8 * codes.element_size()
    if m == 1:
        block, rows = 4096 // bits, 16 if bits == 16 else 8
        if codes.dtype == torch.int32 and gated:
            block //= 2
        rows //= 2 if gated else 1
        while rows > 2 and outputs < rows * PROGRAMS:
            rows //= 2
    else:
        four_bit = codes.dtype == torch.uint8
        block = 64 if dtype == torch.float32 or four_bit and normed else 128
        rows = 16 if four_bit and m > 16 else 32
    block = min(block, max(32, power_of_2(stored)))
    tiles, blocks = -(-outputs // rows), -(-stored // block)
    splits = max(1, min(PROGRAMS // tiles, blocks // 4, 16)) if tiles <= TILES else 1
    inputs = 1 if m == 1 else 16 if m <= 16 else 32
    return {"INPUTS": inputs, "ROWS": rows, "BLOCK": block, "SPLITS": 1 << splits.bit_length() - 1}


def counters(like: Tensor) -> Tensor:
    """Return zeros, one for each tile, on a tensor's device; every launch leaves them as it found them."""
    if isinstance(like, FakeTensor):
        return like.new_empty(TILES, dtype=torch.int32)
    return _counters(like.device)


@cache
def _counters(device: torch.device) -> Tensor:
    return torch.zeros(TILES, dtype=torch.int32, device=device)


def dot_dtype(dtype: torch.dtype) -> Any:
    """Return Triton's name of a dtype."""
    return getattr(tl, {torch.bfloat16: "bfloat16", torch.float16: "float16"}.get(dtype, "float32"))
