"""LayerNorm and RMSNorm in Triton against the formulas in float64."""

import pytest
import torch
from torch import Tensor

from helpers.compare import off
from helpers.triton_kernels import DEVICE, NARROW, inputs, results, rounds_once
from lit_gpt.kernels import norms

SHAPES = [(1, 7, 4544), (2, 33, 48), (1, 1, 100), (5, 600, 8)]  # the last has many rows to a tile, and many tiles


def plain_layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    y = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@pytest.mark.parametrize("shape, frozen", [*((shape, ()) for shape in SHAPES), (SHAPES[1], (1,)), (SHAPES[0], (1, 2))])
def test_layer_norm(shape, frozen):
    given = inputs(shape, shape[-1:], shape[-1:], frozen=frozen)
    rounds_once(lambda x, w, b: norms.layer_norm(x, w, b, 1e-5), plain_layer_norm, given)


def test_layer_norm_without_bias_and_without_weight():
    given = inputs((9, 72), (72,))
    rounds_once(lambda x, w: norms.layer_norm(x, w, None, 1e-5), plain_layer_norm, given)
    rounds_once(lambda x: norms.layer_norm(x, None, None, 1e-5), plain_layer_norm, given[:1])


@pytest.mark.parametrize(
    "shape, frozen, offset",
    [*((shape, (), 0.0) for shape in SHAPES), (SHAPES[1], (), 1.0), (SHAPES[0], (1,), 1.0), (SHAPES[0], (1,), 0.0)],
)
def test_rms_norm(shape, frozen, offset):
    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return (offset + weight) * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    given = inputs(shape, shape[-1:], frozen=frozen)
    rounds_once(lambda *a: norms.rms_norm(*a, 1e-5, offset), plain, given)


def test_rows_of_a_view():
    x = torch.randn(6, 40, device=inputs((1,))[0].device)
    view, weight = x[:, 8:24], torch.randn(16, device=x.device)
    assert torch.equal(norms.rms_norm(view, weight, 1e-5), norms.rms_norm(view.clone(), weight, 1e-5))


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("stream_used", [True, False])
def test_the_stream_gets_both_gradients(centered, scale, stream_used):
    def both(stream: Tensor, y: Tensor) -> Tensor:
        return torch.cat((stream, y), dim=-1) if stream_used else y

    def ours(x: Tensor, added: Tensor, w: Tensor) -> Tensor:
        if centered:
            return both(*norms.add_and_layer_norm(x, added, scale, w, None, 1e-5))
        return both(*norms.add_and_rms_norm(x, added, scale, w, 1e-5))

    def plain(x: Tensor, added: Tensor, w: Tensor) -> Tensor:
        stream = x + scale * added
        if centered:
            return both(stream, plain_layer_norm(stream, w))
        return both(stream, w * stream / (stream.square().mean(-1, keepdim=True) + 1e-5).sqrt())

    # in 16 bits the norm sees the stream as that is rounded
    exact = results(plain, inputs((2, 9, 72), (2, 9, 72), (72,)), torch.float64)
    for dtype, bound in ((torch.float32, 1e-5), (NARROW, 0.008), (torch.float16, 0.001)):
        found = results(ours, inputs((2, 9, 72), (2, 9, 72), (72,)), dtype)
        assert len(found) == len(exact) == 4
        assert all(off(a.double(), b) < bound for a, b in zip(found, exact, strict=True))


def test_only_the_stream_is_used():
    x = torch.randn(3, 16, device=DEVICE, requires_grad=True)
    stream, _ = norms.add_and_rms_norm(x, None, 1.0, torch.ones(16, device=DEVICE), 1e-5)
    (grad,) = torch.autograd.grad(stream.sum(), x)
    assert torch.equal(grad, torch.ones_like(x))
