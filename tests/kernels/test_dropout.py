"""Dropout: one formula, in plain integers, in torch's operations and in the C++ kernel."""

import pytest
import torch
from torch import Tensor

from lit_gpt.kernels import ops
from lit_gpt.kernels.dropout import draw, dropout, dropped, kept_share, random_bits

LARGE = draw(torch.tensor(0), torch.arange(2**13))  # keys


def splitmix(seed: int, n: int) -> int:
    """Return number n from a seed on."""
    x = (seed + (n + 1) * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def bits(key: int, column: int) -> int:
    h = (column // 32 * 16 + column % 16 + key) % 2**32
    h = (h ^ h >> 16) * 0x7FEB352D % 2**32
    h = (h ^ h >> 15 ^ key >> 32) * 0x846CA68B % 2**32
    h ^= h >> 16
    return h & 0xFFFF if column % 32 < 16 else h >> 16


def test_keys_are_splitmix64s():
    assert draw(torch.tensor(0), torch.tensor(0)).item() % 2**64 == 0xE220A8397B1DCDAF  # as published for the seed 0
    for seed in (0, 5, 2**63 - 1):
        found = draw(torch.tensor(seed), torch.arange(40)).tolist()
        assert [x % 2**64 for x in found] == [splitmix(seed, n) for n in range(40)]


@pytest.mark.parametrize("size", [8, 16, 24, 32, 72])
def test_columns_get_their_bits(size):
    found = random_bits(LARGE[:20], size)
    assert found.tolist() == [[bits(key % 2**64, column) for column in range(size)] for key in LARGE[:20].tolist()]


def kernel_mask(keys: Tensor, size: int, kept: int) -> Tensor:
    """Return what the kernel keeps of x (rows, size), 1 or 0: the low-rank product of ones with the identity."""
    ones, zeros = torch.ones(len(keys), size), torch.zeros(len(keys), 8)
    return ops.lora_(zeros, ones, torch.eye(size), torch.zeros(8, size), keys, kept, [0], [8], 1.0)


@pytest.mark.skipif(not ops.available(), reason="no C++ compiler")
@pytest.mark.parametrize("size", [8, 24, 128])
def test_the_kernel_follows_the_formula(size):
    for kept in (0, 1, 30000, 2**16):
        assert torch.equal(kernel_mask(LARGE[:50], size, kept), (random_bits(LARGE[:50], size) < kept).float())


@pytest.mark.skipif(not ops.available(), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1, 16, 33, 72, 100])
def test_the_kernel_drops_what_the_formula_drops(size, dtype):
    x = torch.randn(50, size).to(dtype)
    x[3] = torch.inf
    for kept in (0, 1, 30000, 2**16):
        assert torch.equal(ops.drop(x, LARGE[:50], kept), dropped(x, LARGE[:50], kept))


@pytest.mark.parametrize("p", [0.0, 0.001, 0.05, 0.5, 1.0])
def test_dropout_strikes_each_element_alike(p):
    """The rate is within five standard deviations, and no element is bound to another, nor to another layer's."""
    size, p = 128, 1 - kept_share(p) / 2**16
    mask, other = (
        (random_bits(keys, size) >= kept_share(p)).flatten().double() for keys in (LARGE, draw(LARGE, LARGE))
    )
    n = len(mask)
    assert abs(mask.mean() - p) <= 5 * (p * (1 - p) / n) ** 0.5
    bound = 6 * p * (1 - p**2) ** 0.5 / (n // 2) ** 0.5
    for lag in (1, 2, 3, 4, 8, 16, 64, size, size + 1, n // 2):
        assert abs((mask[lag:] * mask[:-lag]).mean() - p * p) <= bound
    assert abs((mask * other).mean() - p * p) <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dropout_drops_what_is_not_finite(dtype):
    x = torch.full((20, 40), torch.nan, dtype=dtype)
    assert torch.equal(dropped(x, LARGE[:20], 0), torch.zeros_like(x))
    assert dropped(x, None, 0) is x and dropped(x, LARGE[:20], 2**16) is x


def test_what_stays_is_as_much_larger():
    x = torch.ones(2**10, 40, dtype=torch.float64, requires_grad=True)
    y = dropout(x, LARGE[: 2**10], 0.25)
    y.sum().backward()
    assert set(y.detach().unique().tolist()) == {0.0, 4 / 3} and torch.equal(x.grad, y.detach())
