"""LayerNorm and RMSNorm in Triton against the formulas in float64."""

import pytest
import torch
from torch import Tensor

from helpers.triton_kernels import inputs, rounds_once
from lit_gpt.kernels import norms

SHAPES = [(3, 7, 4544), (2, 33, 48), (1, 1, 100), (5, 600, 8)]  # the last has many rows to a tile, and many tiles


def plain_layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    y = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("frozen", [(), (1,), (1, 2)], ids=["all train", "frozen weight", "frozen"])
def test_layer_norm(shape, frozen):
    given = inputs(shape, shape[-1:], shape[-1:], frozen=frozen)
    rounds_once(lambda x, w, b: norms.layer_norm(x, w, b, 1e-5), plain_layer_norm, given)


def test_layer_norm_without_bias_and_without_weight():
    given = inputs((9, 72), (72,))
    rounds_once(lambda x, w: norms.layer_norm(x, w, None, 1e-5), plain_layer_norm, given)
    rounds_once(lambda x: norms.layer_norm(x, None, None, 1e-5), plain_layer_norm, given[:1])


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("frozen", [(), (1,)], ids=["all train", "frozen weight"])
def test_rms_norm(shape, frozen, offset):
    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return (offset + weight) * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    given = inputs(shape, shape[-1:], frozen=frozen)
    rounds_once(lambda *a: norms.rms_norm(*a, 1e-5, offset), plain, given)


def test_rows_of_a_view():
    x = torch.randn(6, 40, device=inputs((1,))[0].device)
    view, weight = x[:, 8:24], torch.randn(16, device=x.device)
    assert torch.equal(norms.rms_norm(view, weight, 1e-5), norms.rms_norm(view.clone(), weight, 1e-5))
