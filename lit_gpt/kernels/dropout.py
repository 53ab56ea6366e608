"""Says what dropout drops, as one plain formula that all kernels follow, here in torch's operations.

Nothing is random but a key for each row of x. Whether an element stays follows from its row's key and its column, so
that a backward pass drops the same without a mask that was kept, and so does any device, kernel or cut of a batch into
rows.

A key comes from a seed, the sample and position that the row is of, and the layer, see lit_gpt.model.noise:

    key = draw(draw(draw(seed, sample), position), layer)

`draw(seed, n)` is number n of those that SplitMix64 gives from a seed on (Steele, Lea & Flood 2014). All arithmetic is
that of unsigned 64 bits:

    x = seed + (n + 1) * 0x9e3779b97f4a7c15
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9
    x = (x ^ x >> 27) * 0x94d049bb133111eb
    draw(seed, n) = x ^ x >> 31

Each column has 16 bits, and two columns share the halves of a word: of every 32 columns those from 0 to 15 have the
lower halves of 16 words, those from 16 to 31 the upper ones. All arithmetic is that of unsigned 32 bits, with the lower
and the upper half of the key; the rounds are those of lowbias32 (Wellons 2018):

    h = (column // 32 * 16 + column % 16) + key_low
    h = (h ^ h >> 16) * 0x7feb352d
    h = (h ^ h >> 15 ^ key_high) * 0x846ca68b
    h = h ^ h >> 16
    bits(key, column) = column % 32 < 16 ? h & 0xffff : h >> 16

An element stays if `bits(key, column) < kept`, where `kept` is the probability to stay in 65536ths (`kept_share`); it
is then multiplied by 65536 / kept.
"""

import torch
from torch import Tensor

ALL_KEPT = 2**16  # the `kept` that drops nothing


def kept_share(dropout: float) -> int:
    """Return the probability to stay, in 65536ths."""
    return ALL_KEPT - round(dropout * ALL_KEPT)


def draw(seed: Tensor, n: Tensor) -> Tensor:
    """Return number n of those that SplitMix64 gives from a seed on: int64, of the shape to which both broadcast."""
    x = n * _signed(0x9E3779B97F4A7C15) + _signed(0x9E3779B97F4A7C15) + seed
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def random_bits(keys: Tensor, size: int) -> Tensor:
    """Return the 16 bits of each of `size` columns in rows of these keys, int64 (T,), as int32 (T, size)."""
    low, high = (half.to(torch.int32).unsqueeze(1) for half in (keys, keys >> 32))  # the narrower type wraps around
    h = torch.arange(-(-size // 32) * 16, dtype=torch.int32, device=keys.device) + low
    h = h.bitwise_xor_(_shifted(h, 16)).mul_(0x7FEB352D)
    h = h.bitwise_xor_(_shifted(h, 15)).bitwise_xor_(high).mul_(_signed(0x846CA68B, 32))
    h = h.bitwise_xor_(_shifted(h, 16)).unflatten(1, (-1, 1, 16))
    return torch.cat((h & 0xFFFF, _shifted(h, 16)), dim=2).flatten(1)[:, :size]


def dropped(x: Tensor, keys: Tensor | None, kept: int) -> Tensor:
    """Return x (T, size) with zero where an element is dropped, the others as they are.

    Args:
        keys: int64 (T,); None: nothing is dropped.
    """
    if keys is None or kept == ALL_KEPT:
        return x
    return x.masked_fill(random_bits(keys, x.size(1)) >= kept, 0)


def dropout(x: Tensor, keys: Tensor, p: float) -> Tensor:
    """Return x (T, size) with elements dropped with probability p, and the others as much larger; for autograd."""
    kept = kept_share(p)
    return dropped(x, keys, kept) * (ALL_KEPT / kept if kept else 0.0)


def _shifted(x: Tensor, n: int) -> Tensor:
    """Return x shifted right by n bits, with zeros from the left."""
    return (x >> n) & (2 ** (8 * x.element_size() - n) - 1)


def _signed(x: int, bits: int = 64) -> int:
    """Return the signed integer that has the bits of an unsigned one."""
    return x - 2**bits if x >> bits - 1 else x
