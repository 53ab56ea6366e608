"""Gates, rotation and the loss in Triton against formulas in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.compare import off
from helpers.triton_kernels import DEVICE, NARROW, inputs, results, rounds_once
from lit_gpt.kernels import functional
from lit_gpt.model.loss import summed_cross_entropy


@pytest.mark.parametrize("activation", functional.ACTIVATIONS.values(), ids=functional.ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2, 33, 100), (1, 7, 2 * 1100), (3, 2)], ids=str)
def test_gated(activation, shape):
    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return activation(gate) * up

    rounds_once(lambda x: functional.gated(x, activation), plain, inputs(shape))


@pytest.mark.parametrize("activation", functional.ACTIVATIONS.values(), ids=functional.ACTIVATIONS)
def test_gated_of_large_numbers(activation):
    x = torch.tensor([[-1e10, -200.0, 200.0, 1e10, 1.0, 1.0, 1.0, 1.0]], device=DEVICE, requires_grad=True)
    y, grad = results(lambda x: functional.gated(x, activation), [x], torch.float32)
    expected, expected_grad = results(lambda x: activation(x[:, :4]) * x[:, 4:], [x], torch.float32)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-6)


def plain_rotation(x: Tensor, cos: Tensor, sin: Tensor, heads: int, size: int) -> Tensor:
    x = x.view(*x.shape[:2], -1, size)
    turned, rest = x[:, :, :heads, : cos.size(-1)], x[:, :, :heads, cos.size(-1) :]
    low, high = turned.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned = turned * cos + torch.cat((-high, low), dim=-1) * sin
    return torch.cat([torch.cat([turned, rest], dim=-1), x[:, :, heads:]], dim=2).flatten(2)


CASES = [  # heads, of which rotate, their size, of which rotates
    (5, 3, 16, 16),
    (73, 72, 64, 64),
    (6, 4, 80, 20),
    (4, 4, 6, 2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_rotation(case, by_row, split):
    heads, turned, size, elements = case
    angles = torch.randn(*([2] if by_row else []), 3, elements // 2, device=DEVICE).repeat(*[1] * (1 + by_row), 2)
    cos, sin = (f(angles).mul(1.1).to(NARROW) for f in (torch.cos, torch.sin))
    widths = [(turned - 1) * size, size, (heads - turned) * size]

    def ours(x: Tensor) -> Tensor:
        given = x.clone(), cos.to(x.dtype), sin.to(x.dtype), turned, size
        return torch.cat(functional.rotate_split(*given, widths), dim=-1) if split else functional.rotate(*given)

    rounds_once(ours, lambda x: plain_rotation(x, cos.to(x), sin.to(x), turned, size), inputs((2, 3, heads * size)))


def test_rotation_takes_the_memory_of_what_it_rotates():
    x, cos = torch.randn(1, 9, 48, device=DEVICE), torch.randn(9, 16, device=DEVICE)
    parts = functional.rotate_split(x, cos, cos, 2, 16, [16, 16, 16])
    assert {part.untyped_storage().data_ptr() for part in parts} == {x.untyped_storage().data_ptr()}


class Head(torch.nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features = len(weight)
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("rows, size", [(139, 50), (9, 5000)])  # of two chunks; over two blocks of the kernel
def test_loss(cap, rows, size, monkeypatch):
    monkeypatch.setattr("lit_gpt.model.loss.MAX_LOGITS", size)  # chunks of rows
    hidden, weight = inputs((rows, 16), (size, 16), frozen=(1,))
    labels = torch.randint(size, (rows,), device=DEVICE)

    def finish(logits: Tensor) -> Tensor:
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        logits = finish(F.linear(x, weight))
        return F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), labels, reduction="sum")

    exact = results(plain, [hidden, weight], torch.float64)
    for dtype in (torch.float32, NARROW, torch.float16):
        found = results(lambda x, w: summed_cross_entropy(Head(w), x, labels, finish), [hidden, weight], dtype)
        rivals = results(plain, [hidden, weight], dtype)
        for actual, rival, expected in zip(found, rivals, exact, strict=True):
            assert actual.dtype == rival.dtype
            assert off(actual.double(), expected) <= 1.2 * off(rival.double(), expected) + 1e-5


def test_loss_of_a_certain_and_of_an_impossible_token():
    head = torch.nn.Identity()
    head.out_features = 3
    logits = torch.tensor([[90.0, -100.0, 0.0], [90.0, -100.0, 0.0]], device=DEVICE, requires_grad=True)
    loss = summed_cross_entropy(head, logits * 1, torch.tensor([0, 1], device=DEVICE))
    loss.backward()
    assert loss.item() == 190
    assert torch.allclose(logits.grad.cpu(), torch.tensor([[0.0, 0, 0], [1, -1, 0]]), atol=1e-30)


def test_sum_of_three():
    rounds_once(functional.sum_of_three, lambda a, b, c: a + b + c, inputs(*[(2, 9, 700)] * 3))


@pytest.mark.parametrize("shape", [(2, 60, 17), (1, 2100, 130), (3, 1)], ids=str)
def test_scaled(shape):
    def ours(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:  # scale and shift are float32 in every run
        return functional.scaled(y, scale.float(), shift.float())

    rounds_once(ours, lambda y, scale, shift: (y + shift) * scale, inputs(shape, shape[-1:], shape[-1:]))
