"""The short causal convolution, by its kernel and by the formula: results and gradients."""

import pytest
import torch
from torch import Tensor

from helpers.compare import off
from lit_gpt.kernels import ops
from lit_gpt.kernels.convolution import causal_convolution
from lit_gpt.kernels.policy import use_policy

LENGTHS = 9, 1, 2, 38  # of packed samples


def results(given: list[Tensor], tail: Tensor, positions: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Return the convolution of a part of wider rows, and the gradients of rows, weight and bias."""
    given = [x.to(dtype).requires_grad_() for x in given]
    x, weight, *bias = given[0][..., 8:-8], *given[1:]
    y = causal_convolution(x, tail.to(dtype), weight, *(bias or [None]), positions)
    above = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).bfloat16().to(dtype)
    return [y.detach(), *torch.autograd.grad(y, given, above)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "T", "size"), [(1, 50, 4), (2, 7, 3), (3, 1, 4), (2, 2, 4)])
def test_convolution(rows, T, size, bias, with_kernels):
    """Of samples that are packed where there is one row, else after the tails of others."""
    torch.manual_seed(0)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]) if rows == 1 else None
    shapes = (rows, T, 56), (40, 1, size), (40,)
    exact = [torch.randn(shape).bfloat16().double() for shape in shapes[: 2 + bias]]
    tail = torch.randn(rows, size - 1, 40).bfloat16() * (rows > 1)
    expected = results(exact, tail, positions, torch.float64)
    with use_policy(fused=True):
        assert ops.supports_convolution(torch.zeros(rows, T, 40), tail.float()) is with_kernels
        for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
            for found, right in zip(results(exact, tail, positions, dtype), expected, strict=True):
                assert found.dtype == dtype and off(found.double(), right) < bound


def test_no_sample_sees_another(with_kernels):
    x, weight = torch.randn(1, 50, 16), torch.randn(16, 1, 4)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    with use_policy(fused=True):
        packed = causal_convolution(x, torch.zeros(1, 3, 16), weight, None, positions)
        alone = [causal_convolution(part, torch.zeros(1, 3, 16), weight, None, None) for part in x.split(LENGTHS, 1)]
    assert torch.equal(packed, torch.cat(alone, dim=1))
