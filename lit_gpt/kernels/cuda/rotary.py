"""Rotary position embedding (Su et al. 2021, RoFormer) of the heads in one product, computed in float32.

The second half of what is rotated of a head is turned against the first; the second half of the angles repeats the
first, and is not read.
"""

from collections.abc import Sequence

from torch import Tensor

from lit_gpt.kernels.cuda.language import jit, power_of_2, tl
from lit_gpt.kernels.cuda.launch import launch

TILE = 2048  # elements of a row that a program has


@jit
def rotate_kernel(
    qkv, cos, sin, width, period, heads, head_size, half, HEADS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, head, pair = tl.program_id(0), tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    angle = row % period * 2 * half + pair
    c = tl.load(cos + angle, pair < half, 0.0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, pair < half, 0.0).to(tl.float32)[None, :]
    at = qkv + row.to(tl.int64) * width + head[:, None] * head_size + pair[None, :]
    inside = (head < heads)[:, None] & (pair < half)[None, :]
    low = tl.load(at, inside, 0.0).to(tl.float32)
    high = tl.load(at + half, inside, 0.0).to(tl.float32)
    dtype = qkv.dtype.element_ty
    tl.store(at, (low * c - high * s).to(dtype), inside)
    tl.store(at + half, (high * c + low * s).to(dtype), inside)


@jit
def rotate_parts_kernel(
    first, second, third, fourth, to, cos, sin, width, period, heads, head_size, half, sign, COUNTS: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head, place = tl.program_id(0), tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    other = tl.where(place < half, place + half, place - half)  # what the element is turned against
    turned = (head < heads)[:, None] & (place < 2 * half)[None, :]
    value, against, begin = tl.zeros([HEADS, BLOCK], tl.float32), tl.zeros([HEADS, BLOCK], tl.float32), 0
    for p in tl.static_range(len(COUNTS)):
        part = first if p == 0 else second if p == 1 else third if p == 2 else fourth
        if part is not None:
            own = ((head >= begin) & (head < begin + COUNTS[p]))[:, None] & (place < head_size)[None, :]
            at = part + row.to(tl.int64) * COUNTS[p] * head_size + (head - begin)[:, None] * head_size
            value += tl.load(at + place[None, :], own, 0.0).to(tl.float32)
            against += tl.load(at + other[None, :], own & turned, 0.0).to(tl.float32)
        begin += COUNTS[p]
    angle = row % period * 2 * half + tl.where(place < half, place, place - half)
    c = tl.load(cos + angle, place < 2 * half, 1.0).to(tl.float32)[None, :]
    s = (
        tl.load(sin + angle, place < 2 * half, 0.0).to(tl.float32)[None, :]
        * tl.where(place < half, -sign, sign)[None, :]
    )
    value = tl.where(turned, value * c + against * s, value)
    at = to + row.to(tl.int64) * width + head[:, None] * head_size + place[None, :]
    tl.store(at, value.to(to.dtype.element_ty), (head * head_size < width)[:, None] & (place < head_size)[None, :])


def supports_rotation(qkv: Tensor, cos: Tensor, head_size: int) -> bool:
    """Return whether these kernels take such tensors, which `lit_gpt.kernels.cuda.launch.serves`."""
    return cos.shape[:-1] in (qkv.shape[:2], qkv.shape[1:2]) and qkv.size(-1) % head_size == 0


def rotate_(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, head_size: int) -> Tensor:
    """Rotate the first `heads` heads of qkv (B, T, heads * head_size), contiguous, in place; return it.

    Args:
        cos, sin: (T, rope_n_elem) or (B, T, rope_n_elem).
    """
    cos, sin, half = cos.contiguous(), sin.contiguous(), cos.size(-1) // 2
    width, period, block = qkv.size(-1), cos.numel() // (2 * half), power_of_2(half)
    at_once = _heads(heads, block)
    grid, numbers = (qkv.numel() // width, -(-heads // at_once)), (width, period, heads, head_size, half)
    launch(rotate_kernel, grid, qkv, cos, sin, *numbers, HEADS=at_once, BLOCK=block)
    return qkv


def rotated(parts: Sequence[Tensor], cos: Tensor, sin: Tensor, heads: int, head_size: int, sign: float) -> Tensor:
    """Return up to four parts (B, T, some heads * head_size), side by side, with their first `heads` heads rotated.

    Args:
        cos, sin: (T, rope_n_elem) or (B, T, rope_n_elem).
        sign: 1, or -1 to rotate back.
    """
    parts, cos, sin = [x.contiguous() for x in parts], cos.contiguous(), sin.contiguous()
    counts, half = tuple(x.size(-1) // head_size for x in parts), cos.size(-1) // 2
    width, period, block = sum(counts) * head_size, cos.numel() // (2 * half), power_of_2(head_size)
    to, at_once = parts[0].new_empty(*parts[0].shape[:2], width), _heads(sum(counts), block)
    four = *parts, *[None] * (4 - len(parts))
    grid, numbers = (to.numel() // width, -(-sum(counts) // at_once)), (width, period, heads, head_size, half, sign)
    launch(rotate_parts_kernel, grid, *four, to, cos, sin, *numbers, COUNTS=counts, HEADS=at_once, BLOCK=block)
    return to


def _heads(heads: int, block: int) -> int:
    return min(power_of_2(heads), max(1, TILE // block))
