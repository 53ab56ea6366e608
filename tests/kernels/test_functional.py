"""The operations with gradients of their own against plain formulas: results and gradients."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from helpers.compare import off
from helpers.tiny_models import Tiny
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.kernels import attention, functional, norms, ops
from lit_gpt.kernels.attention import ScoreParams
from lit_gpt.kernels.dropout import draw, kept_share, random_bits
from lit_gpt.kernels.policy import use_policy
from lit_gpt.methods import lora
from lit_gpt.model import packed_inputs as inputs_module
from lit_gpt.model import sdpa
from lit_gpt.model.loss import summed_cross_entropy

NARROW, WIDE = torch.bfloat16, torch.float64
PARTS = [(0, 5), (9, 16)]
KEYS = draw(torch.tensor(5), torch.arange(122))  # of rows, for dropout


def results(f: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return the result and the gradients of the inputs that want one; float32 and float64 inputs keep their dtype."""
    given = [x.detach().to(dtype if x.dtype == NARROW else x.dtype).requires_grad_(x.requires_grad) for x in inputs]
    y = f(*given)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=WIDE).to(NARROW).to(y.dtype))
    return [y.detach(), *(x.grad for x in given if x.requires_grad)]


def holds(ours: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Assert the same in float32, and in bfloat16, as which inputs come, no more error than the plain formula's."""
    exact = results(plain, [x.detach().to(WIDE).requires_grad_(x.requires_grad) for x in inputs], WIDE)
    for actual, expected in zip(results(ours, inputs, torch.float32), exact, strict=True):
        assert off(actual, expected) < 1e-5
    for actual, rival, expected in zip(
        results(ours, inputs, NARROW), results(plain, inputs, NARROW), exact, strict=True
    ):
        assert actual.dtype == rival.dtype and off(actual.double(), expected) <= 1.2 * off(rival.double(), expected)


def inputs(*shapes: tuple[int, ...], frozen: tuple[int, ...] = ()) -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(shape).to(NARROW).requires_grad_(i not in frozen) for i, shape in enumerate(shapes)]


# LoRA's update


def mask_of(x: Tensor, dropout: float) -> Tensor:
    """Return what the update multiplies x with, float64."""
    kept = kept_share(dropout)
    return (random_bits(KEYS[: len(x)], x.size(1)) < kept) * (torch.ones((), dtype=WIDE) * 2**16 / kept)


def plain_update(y: Tensor, x: Tensor, A: Tensor, B: Tensor, mask: Tensor) -> Tensor:
    low = F.linear((x * mask).to(x.dtype), A.to(x.dtype))
    first, second = (F.linear(a, b.to(x.dtype)) * 2.0 for a, b in zip(low.split(4, -1), B.split([5, 7]), strict=True))
    return y + torch.cat([first, y.new_zeros(*y.shape[:-1], 4), second, y.new_zeros(*y.shape[:-1], 1)], dim=-1)


def our_update(y: Tensor, x: Tensor, A: Tensor, B: Tensor, dropout: float) -> Tensor:
    return functional.low_rank_update(y.clone(), x, A, B, PARTS, 2.0, dropout, KEYS[: len(x)])


@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("frozen", [(), (0, 1), (2,)], ids=["inner", "first", "A"])  # whose input wants no gradient
def test_low_rank_update(dtype, dropout, frozen):
    given = inputs((122, 17), (122, 24), (8, 24), (12, 4), frozen=frozen)
    given = [
        w.detach().to(dtype if i < 2 else torch.float32).requires_grad_(i not in frozen) for i, w in enumerate(given)
    ]
    mask = mask_of(given[1], dropout)
    exact = results(
        lambda *a: plain_update(*a, mask), [x.detach().double().requires_grad_(x.requires_grad) for x in given], WIDE
    )
    ours = results(lambda *a: our_update(*a, dropout), given, dtype)
    plain = results(lambda *a: plain_update(*a, mask), given, dtype)
    for actual, rival, expected in zip(ours, plain, exact, strict=True):
        assert actual.dtype == rival.dtype
        assert off(actual.double(), expected) <= (1e-5 if dtype != NARROW else 1.2 * off(rival.double(), expected))


@pytest.mark.skipif(not ops.available(), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rank", [4, 8, 16])
@pytest.mark.parametrize("size", [24, 64])
@pytest.mark.parametrize("A_trains", [True, False])
def test_low_rank_update_kernel(dtype, dropout, rank, size, A_trains):
    parts = [(0, 16), (24, 320)]
    y, x, A, B = inputs((122, 328), (122, size), (2 * rank, size), (312, rank))
    given = [y.detach().to(dtype).requires_grad_(), x.detach().to(dtype).requires_grad_()]
    given += [A.detach().float().requires_grad_(A_trains), B.detach().float().requires_grad_()]
    mask = mask_of(x, dropout)

    def plain(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        low = F.linear((x * mask).to(x.dtype), A.to(x.dtype)).split(rank, -1)
        first, second = (F.linear(a, b.to(x.dtype)) * 2.0 for a, b in zip(low, B.split([16, 296]), strict=True))
        return y + torch.cat([first, y.new_zeros(122, 8), second, y.new_zeros(122, 8)], dim=-1)

    def ours(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return functional.low_rank_update(y.clone(), x, A, B, parts, 2.0, dropout, KEYS)

    assert ops.supports_lora(*given[:2], given[3], KEYS, parts)
    exact = results(plain, [t.detach().double().requires_grad_(t.requires_grad) for t in given], WIDE)
    for actual, rival, expected in zip(results(ours, given, dtype), results(plain, given, dtype), exact, strict=True):
        assert actual.dtype == rival.dtype
        assert off(actual.double(), expected) <= (1e-5 if dtype != NARROW else 1.2 * off(rival.double(), expected))


@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
def test_scaled(dtype):
    y, scale, shift = inputs((2, 60, 17), (17,), (17,))
    given = [y.detach().to(dtype).requires_grad_(), *(x.detach().float().requires_grad_() for x in (scale, shift))]

    def plain(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return (y + shift.to(y.dtype)) * scale.to(y.dtype)

    exact = results(plain, [x.detach().double().requires_grad_() for x in given], WIDE)
    for actual, rival, expected in zip(results(functional.scaled, given, dtype), results(plain, given, dtype), exact,
                                      strict=True):  # fmt: skip
        assert actual.dtype == rival.dtype
        assert off(actual.double(), expected) <= (1e-5 if dtype != NARROW else 1.2 * off(rival.double(), expected))


def test_low_rank_update_gradcheck():
    args = [x.detach().double().requires_grad_() for x in inputs((3, 17), (3, 24), (8, 24), (12, 4))]
    assert gradcheck(lambda *a: our_update(*a, 0.3), args)


@pytest.mark.parametrize("training", [True, False])
def test_lora_layer_drops_only_when_it_trains(training):
    torch.manual_seed(0)
    layer = lora.LoRALinear(torch.nn.Linear(24, 16), [(0, 16)], lora.LoRAConfig(r=4, dropout=0.5)).train(training)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 7, 24)
    with torch.no_grad():
        plain = layer.linear(x) + 4 * x @ layer.lora_A.T @ layer.lora_B.T
        assert (off(layer(x), plain) < 1e-6) != training


# attention


def plain_attention(q: Tensor, k: Tensor, v: Tensor, scores: ScoreParams, lengths: tuple[int, ...]) -> Tensor:
    outputs = []
    for part in zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True):
        q, k, v = part
        seen = torch.ones(q.size(2), q.size(2), dtype=torch.bool).tril()
        seen = seen if scores.window is None else seen.triu(1 - scores.window)
        if scores.softcap is None:
            outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scores.scale, enable_gqa=True))
            continue
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        s = scores.softcap * torch.tanh(q @ k.mT * scores.scale / scores.softcap)
        outputs.append(s.masked_fill(~seen, -torch.inf).softmax(-1) @ v)
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize("scores", [ScoreParams(0.25), ScoreParams(0.25, 1), ScoreParams(0.4, 50),
                                    ScoreParams(0.4, 50, softcap=1.5)], ids=str)  # fmt: skip
@pytest.mark.parametrize("lengths", [(1, 130, 2, 300, 17), (45,), (256, 128)], ids=str)
def test_attention(groups, scores, lengths, with_kernels):
    T, batch = sum(lengths), 2 if len(lengths) == 1 else 1
    packed = inputs((batch, T, (6 + 2 * groups) * 16))[0]

    def from_packed(f: Callable) -> Callable[[Tensor], Tensor]:
        """Return heads as views of one projection, as the model has them."""

        def run(x: Tensor) -> Tensor:
            q, k, v = x.view(batch, T, -1, 16).split([6, groups, groups], dim=2)
            return f(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scores, lengths)

        return run

    holds(from_packed(attention.attention), from_packed(plain_attention), [packed])


def test_attention_gradcheck(monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 3)
    args = [x.detach().double().requires_grad_() for x in inputs((2, 4, 9, 3), (2, 2, 9, 3), (2, 2, 9, 3))]
    for scores in (
        ScoreParams(0.5),
        ScoreParams(0.5, window=4),
        ScoreParams(0.5, 4, softcap=0.8),
    ):
        assert gradcheck(lambda q, k, v, scores=scores: attention.attention(q, k, v, scores, (2, 7)), args)
        sinks = torch.randn(4).double().requires_grad_()
        assert gradcheck(lambda *a, scores=scores: attention.attention(*a[:3], scores, (2, 7), a[3]), [*args, sinks])


@torch.no_grad()
@pytest.mark.parametrize("scores", [ScoreParams(0.25), ScoreParams(0.25, 9)], ids=str)
def test_a_sink_is_one_more_key_without_a_value(scores):
    q, k, v = (x.detach().float() for x in inputs((2, 6, 45, 16), (2, 2, 45, 16), (2, 2, 45, 16)))
    sinks = torch.randn(6)
    repeated = k.repeat_interleave(3, dim=1)
    seen = torch.ones(45, 45, dtype=torch.bool).tril()
    seen = seen if scores.window is None else seen.triu(1 - scores.window)
    logits = (q @ repeated.mT * scores.scale).masked_fill(~seen, -torch.inf)
    with_sink = torch.cat((logits, sinks.view(1, 6, 1, 1).expand(2, 6, 45, 1)), dim=-1).softmax(-1)
    expected = with_sink[..., :45] @ v.repeat_interleave(3, dim=1)
    assert off(sdpa.attend(q, k, v, scores, sinks), expected) < 1e-6
    assert off(sdpa.attend(q[:, :, 30:], k, v, scores, sinks), expected[:, :, 30:]) < 1e-6
    assert off(sdpa.attend(q[:, :, 44:], k, v, scores, sinks), expected[:, :, 44:]) < 1e-6
    last = sdpa.decode_attention(q[:, :, 44:], k, v, scores, torch.tensor([44, 44]), sinks)
    assert off(last, expected[:, :, 44:]) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scores", [ScoreParams(0.25), ScoreParams(0.25, 9)], ids=str)
def test_the_last_queries_of_a_prompt_attend_as_all_do(scores, dtype, with_kernels):
    q, k, v = (x.detach().to(dtype) for x in inputs((2, 6, 130, 16), (2, 2, 130, 16), (2, 2, 130, 16)))
    expected = plain_attention(q.float(), k.float(), v.float(), scores, (130,))
    for first in (0, 5, 64, 128):
        y = sdpa.attend(q[:, :, first:], k, v, scores).float()
        assert off(y, expected[:, :, first:]) < (1e-6 if dtype == torch.float32 else 0.01)


def test_training_attends_as_evaluation(tiny: Tiny):
    """The model itself chooses between the two, on rows of one and of several samples."""
    gpt, idx = load_model(tiny.folder).requires_grad_(True), torch.randint(96, (1, 40))
    for segments in (None, inputs_module.Segments.of([13, 27])):
        with torch.no_grad():
            expected = gpt(idx, segments=segments)
        assert off(gpt(idx, segments=segments).detach(), expected) < 1e-6


@torch.no_grad()
def test_attention_is_in_the_precision_of_the_arithmetic(tiny: Tiny):
    """Full finetuning computes in bfloat16 over float32 weights; norms give float32 there."""
    gpt = load_model(tiny.folder)
    if gpt.h[1].attn is None:
        pytest.skip("has no attention")
    rotation = gpt.rotations(torch.arange(9), (9,), torch.float32)[1]
    with torch.autocast("cpu", NARROW):
        heads = gpt.h[1].attn.project_qkv(torch.randn(1, 9, gpt.config.n_embd), rotation)
    assert {x.dtype for x in heads} == {NARROW}


# norm, gated activation, rotation


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("frozen", [(), (1,), (0,)], ids=["both", "frozen weight", "weight alone"])
def test_rms_norm(frozen, offset, with_kernels):
    def plain(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
        return (wide * (offset + weight.to(wide.dtype))).to(x.dtype) if offset else weight * wide.to(x.dtype)

    given = inputs((2, 33, 48), (48,), frozen=frozen)
    holds(lambda *a: norms.rms_norm(*a, 1e-5, offset), plain, given)
    for x, weight in (given, [x.float() for x in given], [given[0], given[1].float()]) if not with_kernels else ():
        assert torch.equal(norms.rms_norm(x, weight, 1e-5, offset), plain(x, weight))


@pytest.mark.parametrize("f", functional.ACTIVATIONS.values(), ids=functional.ACTIVATIONS)
@pytest.mark.parametrize("size", [48, 50])
def test_gated(f, size, with_kernels):

    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return f(gate) * up

    (x,) = inputs((2, 33, size))
    holds(lambda x: functional.gated(x, f), plain, [x])
    assert with_kernels or torch.equal(functional.gated(x, f), plain(x))
    assert gradcheck(lambda x: functional.gated(x, f), [x[:, :3].detach().double().requires_grad_()])
    extreme = torch.tensor([[-1e10, -200.0, 200.0, 1e10, -1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    for actual, expected in zip(results(lambda x: functional.gated(x, f), [extreme], torch.float32),
                               results(plain, [extreme], torch.float32), strict=True):  # fmt: skip
        assert actual == pytest.approx(expected, rel=1e-5, abs=1e-6)


def plain_rotation(x: Tensor, cos: Tensor, sin: Tensor, heads: int, size: int) -> Tensor:
    x = x.view(*x.shape[:2], -1, size)
    turned, rest = x[:, :, :heads, : cos.size(-1)], x[:, :, :heads, cos.size(-1) :]
    low, high = turned.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned = (turned * cos + torch.cat((-high, low), dim=-1) * sin).to(x.dtype)
    return torch.cat([torch.cat([turned, rest], dim=-1), x[:, :, heads:]], dim=2).flatten(2)


@pytest.mark.parametrize("elements", [16, 8])  # of each head that rotate
@pytest.mark.parametrize("shape", [(9,), (2, 9)], ids=str)
def test_rotation(elements, shape, with_kernels):
    angles = torch.randn(*shape, elements // 2).repeat(*[1] * len(shape), 2)
    cos, sin = angles.cos().mul(1.1).to(NARROW), angles.sin().mul(1.1).to(NARROW)
    (x,) = inputs((2, 9, 5 * 16))

    def ours(x: Tensor) -> Tensor:
        return functional.rotate(x, cos.to(x.dtype), sin.to(x.dtype), 3, 16)

    def plain(x: Tensor) -> Tensor:
        return plain_rotation(x, cos.to(x.dtype), sin.to(x.dtype), 3, 16)

    holds(ours, plain, [x])
    assert with_kernels or torch.equal(ours(x), plain(x))
    wide = cos.float(), sin.float()  # as under autocast
    assert torch.equal(functional.rotate(x, *wide, 3, 16), plain_rotation(x, *wide, 3, 16))
    assert gradcheck(ours, [x.detach().double().requires_grad_()])


# the loss


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("chunk", [7, 10**6])
def test_loss(monkeypatch, chunk, cap):
    monkeypatch.setattr("lit_gpt.model.loss.MAX_LOGITS", chunk * 50)
    hidden, weight = inputs((23, 16), (50, 16), frozen=(1,))
    labels = torch.randint(50, (23,))

    class Head(torch.nn.Module):
        out_features = 50

        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.register_buffer("weight", weight * 5)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    def finish(logits: Tensor) -> Tensor:
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        logits = finish(Head(weight)(x))
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")

    holds(lambda x, weight: summed_cross_entropy(Head(weight), x, labels, finish), plain, [hidden, weight])


def test_loss_of_a_certain_and_of_an_impossible_token():
    head = torch.nn.Identity()
    head.out_features = 3
    logits = torch.tensor([[90.0, -100.0, 0.0], [90.0, -100.0, 0.0]], requires_grad=True)
    loss = summed_cross_entropy(head, logits, torch.tensor([0, 1]))
    loss.backward()
    assert loss.item() == 190
    assert torch.allclose(logits.grad, torch.tensor([[0.0, 0, 0], [1, -1, 0]]), atol=1e-30)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_column_is_refused(label):
    with pytest.raises(IndexError, match="expected 0 to 2"):
        ops.cross_entropy_(torch.zeros(2, 3), torch.tensor([0, label]))


def test_a_logit_that_is_not_a_number_makes_the_loss_none():
    losses = ops.cross_entropy_(torch.tensor([[0.0, torch.nan, 1.0], [0.0, 0.0, -torch.inf]]), torch.tensor([0, 0]))
    assert losses.isnan().tolist() == [True, False] and losses[1] == torch.tensor(2.0).log()


@pytest.mark.parametrize("kernels", [True, False])
def test_an_A_that_is_frozen_keeps_no_activations(kernels):
    """LoRA-FA (Zhang et al. 2023, arXiv 2308.03303): what is kept for the backward pass is of the rank's size."""
    y, x, A, B = (torch.randn(shape) for shape in ((32, 16), (32, 64), (8, 64), (16, 8)))
    sizes = {}
    for trains in (True, False):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            with use_policy(cpp=kernels):
                functional.low_rank_update(
                    y.clone(), x, A.clone().requires_grad_(trains), B.clone().requires_grad_(), [(0, 16)], 1.0, 0.0
                )
        sizes[trains] = sum(t.numel() for t in kept)
    assert sizes[True] - sizes[False] == x.numel()
