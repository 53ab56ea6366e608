"""LoRA's update in Triton: what is dropped, against the formula bit by bit; the rest against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.compare import off
from helpers.triton_kernels import DEVICE, NARROW, WIDE, inputs, results
from lit_gpt.kernels import functional
from lit_gpt.kernels.cuda import ops
from lit_gpt.kernels.dropout import draw, dropped, kept_share, random_bits
from lit_gpt.kernels.policy import use_policy

KEYS = draw(torch.tensor(5), torch.arange(122)).to(DEVICE)


def update(parts, rank: int, dropout: float):
    """Return what adds the update by kernels, and by torch's operations with a mask."""
    mask = (random_bits(KEYS, 1000) < kept_share(dropout)).to(WIDE) * 2**16 / kept_share(dropout)

    def ours(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        # A and B are float32 in every run
        return functional.low_rank_update(y.clone(), x, A.float(), B.float(), parts, 2.0, dropout, KEYS[: len(x)])

    def plain(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        low = F.linear((x * mask[: len(x), : x.size(1)]).to(x.dtype), A).split(rank, -1)
        y, rows = y.clone(), B.split([stop - start for start, stop in parts])
        for (start, stop), columns, b in zip(parts, low, rows, strict=True):
            y[:, start:stop] += F.linear(columns, b) * 2.0
        return y

    return ours, plain


CASES = [  # parts, width of y, size of x, rank, rows
    ([(0, 5), (9, 16)], 17, 24, 4, 122),
    ([(0, 130), (140, 300)], 310, 264, 8, 67),
    ([(3, 40)], 40, 300, 16, 1),
    ([(0, 20), (20, 30), (33, 48)], 48, 100, 20, 33),
]


@pytest.mark.parametrize(
    "case, dropout, frozen",
    [*((case, 0.3, ()) for case in CASES), (CASES[0], 0.0, ()), (CASES[0], 0.3, (0, 1)), (CASES[0], 0.3, (2,))],
)
def test_update(case, dropout, frozen):
    """All train; or y and x do not, as in the first layer; or A does not, as in LoRA-FA."""
    parts, width, size, rank, rows = case
    count = sum(stop - start for start, stop in parts)
    given = inputs((rows, width), (rows, size), (rank * len(parts), size), (count, rank), frozen=frozen)
    ours, plain = update(parts, rank, dropout)
    exact = results(plain, given, WIDE)
    for dtype in (torch.float32, NARROW, torch.float16):
        rivals = exact if dtype == torch.float32 else results(plain, given, dtype)
        for actual, rival, expected in zip(results(ours, given, dtype), rivals, exact, strict=True):
            assert actual.dtype == dtype
            assert off(actual.double(), expected) <= 1.2 * off(rival.double(), expected) + 1e-5


@pytest.mark.parametrize("size", [16, 33, 100])
@pytest.mark.parametrize("kept", [0, 1, 30000, 2**16])
def test_the_formula_says_what_is_dropped(size, kept):
    """The product with the identity shows the mask: forward what x is read with, backward what its gradient is."""
    x, A = torch.randn(50, size, device=DEVICE), torch.eye(size, device=DEVICE)
    x[3] = torch.inf if kept == 0 else 1.0
    B = torch.zeros(8, size, device=DEVICE)
    low = ops.lora_(x.new_zeros(50, 8), x, A, B, KEYS[:50], kept, [0], [8], 1.0)
    assert torch.equal(low, dropped(x, KEYS[:50], kept))
    B[0] = 1.0
    grad = F.one_hot(torch.zeros(50, dtype=torch.int64, device=DEVICE), 8).float()
    x_grad, *_ = ops.lora_backward(grad, x, A, B, KEYS[:50], kept, [0], [8], 1.0, low)
    assert torch.equal(x_grad, dropped(torch.ones_like(x), KEYS[:50], kept))


def test_too_many_ranks_go_by_the_formula():
    given = inputs((9, 8), (9, 16), (130, 16), (8, 130))
    ours, plain = update([(0, 8)], 130, 0.0)
    for actual, expected in zip(results(ours, given, torch.float32), results(plain, given, WIDE), strict=True):
        assert off(actual.double(), expected) < 1e-5


def test_a_policy_without_triton_goes_by_the_formula():
    y = torch.zeros(2, 2, dtype=NARROW, device=DEVICE)
    assert functional.triton_kernels(y) is not None
    with use_policy(triton=False):
        assert functional.triton_kernels(y) is None
