"""Attention of one new token of each row: queries and key are rotated, key and value go into the cache, and the places
up to the row's position are attended to, all by one kernel.

Programs share the places of a row (split keys and values; Dao et al. 2023, Flash-Decoding); the last of them to come
puts their parts together. Where the cache lies is read from device memory, as are the positions, so that a captured
graph serves any cache.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_gpt.kernels.cuda.gemv import counters
from lit_gpt.kernels.cuda.language import jit, power_of_2, tl
from lit_gpt.kernels.cuda.launch import launch

HEADS = 16  # of queries that a program has: the least that the tensor cores take
TILE = 4096  # elements of the cache that it reads at a time
PROGRAMS = 264  # two for each multiprocessor of an H100


@dataclass(frozen=True)
class Heads:
    """Says how a product's heads attend; see lit_gpt.kernels.attention.ScoreParams.

    Attributes:
        n: of queries; `groups` of keys and values, each of `size` elements, follow in the product.
        window: places that a query sees; 0: all.
        softcap: 0: none.
        slopes: (n,), added to the scores by position (Press et al. 2022, ALiBi).
        rotation: cosine and sine, float32 (rows, rotated pairs).
    """

    n: int
    groups: int
    size: int
    scale: float
    softcap: float = 0.0
    window: int = 0
    slopes: Tensor | None = None
    rotation: tuple[Tensor, Tensor] | None = None


@jit
def rotated(qkv, head, d, row, there, cos, sin, pairs, SIZE: tl.constexpr):
    """Return heads (heads, d) of a row's product, float32, rotated if there are angles."""
    at = qkv + head[:, None] * SIZE + d[None, :]
    x = tl.load(at, there, other=0.0)
    if cos is not None:
        turned = there & (d < 2 * pairs)[None, :]
        low, angle = d < pairs, row * pairs + tl.where(d < pairs, d, d - pairs)
        against = tl.load(at + tl.where(low, pairs, -pairs)[None, :], turned, other=0.0)
        c = tl.load(cos + angle, d < 2 * pairs, other=1.0)[None, :]
        s = tl.load(sin + angle, d < 2 * pairs, other=0.0)[None, :]
        x = x * c + against * tl.where(low[None, :], -s, s)
    return x


@jit
def capped(scores, softcap):
    """Return scores with a soft cap, where it is not 0."""
    if softcap is not None:
        scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
    return scores


@jit
def add_token(
    product, k, v, q, slope, group, position, to, stored, row, cos, sin, pairs, softcap,
    N: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Store the new key and value, if `stored`; return the queries' scores of the key, and the value, (1, D)."""
    one, d = tl.arange(0, 1), tl.arange(0, D)
    inside = (d < SIZE)[None, :] & (one == 0)[:, None]
    key = rotated(product + N * SIZE, group + one, d, row, inside, cos, sin, pairs, SIZE).to(DTYPE)
    value = tl.load(product + (N + GROUPS + group) * SIZE + d[None, :], inside, other=0.0).to(DTYPE)
    tl.store(k + to + d[None, :], key, inside & stored)
    tl.store(v + to + d[None, :], value, inside & stored)
    return capped(tl.sum(q * key.to(tl.float32), 1) + slope * position, softcap), value.to(tl.float32)


@jit
def attend_places(
    k, v, q, slope, highest, total, values, begin, start, end, softcap,
    SIZE: tl.constexpr, DTYPE: tl.constexpr, PLACES: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Go over the places from `start` to `end`; return highest score, sum of weights and of weighed values anew."""
    d = tl.arange(0, D)
    for place in range(start, end, PLACES):
        at = place + tl.arange(0, PLACES)
        seen = (at < end)[:, None] & (d < SIZE)[None, :]
        there = begin + at[:, None] * SIZE + d[None, :]
        keys = tl.load(k + there, seen, other=0.0)
        scores = tl.dot(q.to(DTYPE), tl.trans(keys), input_precision="ieee")
        scores = capped(scores + slope[:, None] * at[None, :], softcap)
        scores = tl.where((at < end)[None, :], scores, float("-inf"))
        most = tl.maximum(highest, tl.max(scores, 1))
        weights, fade = tl.exp(scores - most[:, None]), tl.exp(highest - most)
        total = total * fade + tl.sum(weights, 1)
        found = tl.load(v + there, seen, other=0.0)
        values = values * fade[:, None] + tl.dot(weights.to(DTYPE), found, input_precision="ieee")
        highest = most
    return highest, total, values


@jit
def put_together(
    parts, count, tile, share, highest, total, values, to, known,
    SPLITS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write this program's part; the last one to come writes to `to` what all together give."""
    first = parts + tile.to(tl.int64) * SPLITS * HEADS * (D + 2)
    head, size = tl.arange(0, HEADS), HEADS * (D + 2)
    place = head[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(first + share * size + place, values)
    tl.store(first + share * size + HEADS * D + head, highest)
    tl.store(first + share * size + HEADS * (D + 1) + head, total)
    tl.debug_barrier()  # so that the whole part is written when this program counts itself
    if tl.atomic_add(count, 1, sem="acq_rel") == SPLITS - 1:
        highest = tl.full([HEADS], float("-inf"), tl.float32)
        total, values = tl.zeros([HEADS], tl.float32), tl.zeros([HEADS, D], tl.float32)
        for other in range(SPLITS):  # not from the nearest cache, which may hold what was there before
            part = first + other * size
            own = tl.load(part + HEADS * D + head, cache_modifier=".cg")
            most = tl.maximum(highest, own)
            fade, grow = tl.exp(highest - most), tl.exp(own - most)
            total = total * fade + tl.load(part + HEADS * (D + 1) + head, cache_modifier=".cg") * grow
            values = values * fade[:, None] + tl.load(part + place, cache_modifier=".cg") * grow[:, None]
            highest = most
        tl.store(to, values / total[:, None], known)
        tl.store(count, 0)


@jit
def attend_kernel(
    qkv, y, positions, pointers, places, cos, sin, slopes, parts, counts,
    pairs, window, scale, softcap,
    N: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr, DTYPE: tl.constexpr,
    HEADS: tl.constexpr, PLACES: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Attend with HEADS heads of one row and group to one of SPLITS shares of the places."""
    PER: tl.constexpr = N // GROUPS
    BLOCKS: tl.constexpr = (PER + HEADS - 1) // HEADS
    row, share = tl.program_id(0), tl.program_id(2)
    group, block = tl.program_id(1) // BLOCKS, tl.program_id(1) % BLOCKS
    of_group, d = block * HEADS + tl.arange(0, HEADS), tl.arange(0, D)
    head, known = group * PER + of_group, (of_group < PER)[:, None] & (d < SIZE)[None, :]
    product = qkv + row.to(tl.int64) * (N + 2 * GROUPS) * SIZE
    position, room = tl.load(positions + row), tl.load(places)
    k = tl.multiple_of(tl.load(pointers).to(tl.pointer_type(DTYPE)), 16)
    v = tl.multiple_of(tl.load(pointers + 1).to(tl.pointer_type(DTYPE)), 16)
    begin = (row.to(tl.int64) * GROUPS + group) * room * SIZE
    q = rotated(product, head, d, row, known, cos, sin, pairs, SIZE) * scale
    slope = tl.zeros([HEADS], tl.float32)
    if slopes is not None:
        slope = tl.load(slopes + head, of_group < PER, other=0.0)
    highest = tl.full([HEADS], float("-inf"), tl.float32)
    total, values = tl.zeros([HEADS], tl.float32), tl.zeros([HEADS, D], tl.float32)
    if share == 0:  # which has the new token, as the cache will round it
        stored = (block == 0) & (position >= 0) & (position < room)
        highest, value = add_token(
            product, k, v, q, slope, group, position, begin + position * SIZE, stored, row, cos, sin, pairs, softcap,
            N, GROUPS, SIZE, DTYPE, D,
        )  # fmt: skip
        total += 1.0
        values += value
    first = 0 if window is None else tl.maximum(position + 1 - window, 0)
    each = tl.cdiv(tl.cdiv(tl.maximum(position - first, 0), SPLITS), PLACES) * PLACES
    start = first + share * each
    highest, total, values = attend_places(
        k, v, q, slope, highest, total, values, begin, start, tl.minimum(start + each, position), softcap,
        SIZE, DTYPE, PLACES, D,
    )  # fmt: skip
    to = y + row.to(tl.int64) * N * SIZE + head[:, None] * SIZE + d[None, :]
    if SPLITS == 1:
        tl.store(to, values / total[:, None], known)
    else:
        tile = row * tl.num_programs(1) + tl.program_id(1)
        put_together(parts, counts + tile, tile, share, highest, total, values, to, known, SPLITS, HEADS, D)


def attend(
    qkv: Tensor, y: Tensor, positions: Tensor, pointers: Tensor, places: Tensor, heads: Heads, dtype: torch.dtype,
    longest: int,
) -> None:  # fmt: skip
    """Store each row's new key and value in its cache, and write what its queries find, (rows, n * size), to y.

    Args:
        qkv: float32 (rows, (n + 2 * groups) * size), not rotated yet.
        positions: int64 (rows,), of the new tokens; a row at -1 has none, and stores nothing.
        pointers: int64 (2,), the addresses of the keys and values of a layer: (rows, groups, places, size) in `dtype`.
        places: int64 (1,), how many there are.
        longest: that a position is less than, by which the work is shared.
    """
    rows, per = len(positions), heads.n // heads.groups
    tiles = heads.groups * -(-per // HEADS)
    width = power_of_2(max(16, heads.size))
    tile = TILE // 2 if dtype == torch.float32 else TILE  # lest registers are spilled
    at_once = max(16, tile // width)
    splits = max(1, min(longest // at_once, -(-PROGRAMS // (rows * tiles)), 32))
    parts = counts = None
    if splits > 1:
        parts = qkv.new_empty(rows * tiles * splits * HEADS * (width + 2))
        counts = counters(qkv)
    cos, sin = heads.rotation or (None, None)
    sizes = 0 if cos is None else cos.size(1), heads.window or None, heads.scale, heads.softcap or None
    tensors = qkv, y, positions, pointers, places, cos, sin, heads.slopes, parts, counts
    form = {"N": heads.n, "GROUPS": heads.groups, "SIZE": heads.size, "SPLITS": splits, "DTYPE": element(dtype)}
    launch(
        attend_kernel,
        (rows, tiles, splits),
        *tensors,
        *sizes,
        **form,
        HEADS=HEADS,
        PLACES=at_once,
        D=width,
        warps=8 if width > 128 else 4,
    )


def element(dtype: torch.dtype) -> Any:
    """Return Triton's name of a dtype."""
    return getattr(tl, {torch.bfloat16: "bfloat16", torch.float16: "float16"}.get(dtype, "float32"))


@jit
def prefix_kernel(
    qkv, y, k, v, gate, cos, sin, pairs, length, scale, softcap,
    N: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, PLACES: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Add to a head what it finds in a few places that are there for all."""
    row, head = tl.program_id(0), tl.program_id(1)
    one, d, at = head + tl.arange(0, 1), tl.arange(0, D), tl.arange(0, PLACES)
    inside = (d < SIZE)[None, :] & (one >= 0)[:, None]
    product = qkv + row.to(tl.int64) * (N + 2 * GROUPS) * SIZE
    q = rotated(product, one, d, row, inside, cos, sin, pairs, SIZE) * scale
    there = (head // (N // GROUPS) * length + at)[:, None] * SIZE + d[None, :]
    seen = (at < length)[:, None] & (d < SIZE)[None, :]
    scores = capped(tl.sum(q * tl.load(k + there, seen, other=0.0), 1), softcap)
    scores = tl.where(at < length, scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 0))
    found = tl.sum(weights[:, None] * tl.load(v + there, seen, other=0.0), 0) / tl.sum(weights, 0)
    to = y + (row.to(tl.int64) * N + head) * SIZE + d
    tl.store(to, tl.load(to, d < SIZE) + tl.load(gate + head) * found, d < SIZE)


def attend_prefix(
    qkv: Tensor, y: Tensor, rows: int, k: Tensor, v: Tensor, length: int, gate: Tensor, heads: Heads
) -> None:
    """Add `gate` (n,) times what the queries find in keys and values (groups, length, size), float32, to y."""
    cos, sin = heads.rotation or (None, None)
    numbers = 0 if cos is None else cos.size(1), length, heads.scale, heads.softcap or None
    form = {"N": heads.n, "GROUPS": heads.groups, "SIZE": heads.size, "D": power_of_2(heads.size)}
    launch(prefix_kernel, (rows, heads.n), qkv, y, k, v, gate, cos, sin, *numbers, **form, PLACES=power_of_2(length))
