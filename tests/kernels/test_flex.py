"""Flex attention by its plain formula, of which torch refuses the gradients on a CPU, though it has them; its masks;
and how often it compiles."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as torch_flex

from helpers.compare import off
from lit_gpt.kernels import attention, flex
from lit_gpt.kernels.attention import ScoreParams
from lit_gpt.kernels.policy import use_policy
from lit_gpt.model import sdpa
from lit_gpt.model.packed_inputs import Segments

LENGTHS = (1, 130, 2, 300, 17)
CAPPED, WINDOWED = ScoreParams(0.4, softcap=1.5), ScoreParams(0.4, 50, 1.5)


@pytest.fixture(autouse=True)
def with_gradients(monkeypatch):
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)


def heads_of(qkv: Tensor, groups: int) -> tuple[Tensor, ...]:
    """Return heads as views of one projection, as the model has them."""
    parts = qkv.view(1, qkv.size(1), -1, 16).split([6, groups, groups], dim=2)
    return tuple(x.transpose(1, 2) for x in parts)


def both(groups: int, scores: ScoreParams, lengths: tuple[int, ...], sunk: bool = False) -> list[list[Tensor]]:
    """Return result and gradients of flex attention, and of attention.py."""
    torch.manual_seed(0)
    qkv, found = torch.randn(1, sum(lengths), (6 + 2 * groups) * 16), []
    segments, grad = Segments.of(lengths), torch.randn(1, 6, sum(lengths), 16)
    for flexible in (True, False):
        x, sinks = qkv.clone().requires_grad_(), torch.linspace(-1, 1, 6).requires_grad_() if sunk else None
        if flexible:
            y = flex.attention(*heads_of(x, groups), scores, segments.causal_mask(scores.window), sinks)
        else:
            y = attention.attention(*heads_of(x, groups), scores, lengths, sinks)
        y.backward(grad)
        found.append([y.detach(), x.grad] + ([] if sinks is None else [sinks.grad]))
    return found


@pytest.mark.parametrize("sunk", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize(
    "groups, scores", [(6, CAPPED), (2, WINDOWED), (1, ScoreParams(0.25, 1)), (2, ScoreParams(1.0))]
)
def test_flex_attention_is_the_formula(groups, scores, sunk):
    for found, expected in zip(*both(groups, scores, LENGTHS, sunk), strict=True):
        assert off(found, expected) < 1e-5


@pytest.mark.parametrize("window", [None, 1, 50, 128, 200])
@pytest.mark.parametrize("lengths", [LENGTHS, (700,), (256, 128), (5,), (128,)], ids=str)
def test_the_mask_is_the_one_that_torch_finds(lengths, window):
    segments, T = Segments.of(lengths), sum(lengths)
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def seen(batch, head, query, key):
        return (sample[query] == sample[key]) & (key <= query) & (key > query - (window or T))

    found, expected = segments.causal_mask(window), torch_flex.create_block_mask(seen, None, None, T, T, "cpu")
    assert found is segments.causal_mask(window) and found.seq_lengths == expected.seq_lengths
    for name in ("kv", "full_kv", "q", "full_q"):
        for part in ("num_blocks", "indices"):
            assert torch.equal(getattr(found, f"{name}_{part}"), getattr(expected, f"{name}_{part}"))
    places = torch.arange(T)
    pairs = None, None, places[:, None], places
    assert torch.equal(found.mask_mod(*pairs), seen(*pairs))


def test_rows_of_any_length_and_models_of_any_cap_compile(monkeypatch):
    """The graphs are counted: one for a first length and one for others, and as many for another model's numbers."""
    compiled = torch.compile(flex.flex_attention, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(flex, "flex_attention", compiled)
    torch.compiler.reset()
    counters.clear()
    for scores in (CAPPED, ScoreParams(0.3, softcap=2.0)):
        for lengths, window in (((130, 1, 9), None), ((200,), 50), ((140, 150), None), ((256,), 50)):
            row = both(2, replace(scores, window=window), lengths)
            assert all(off(found, expected) < 1e-5 for found, expected in zip(*row, strict=True))
    assert counters["stats"]["unique_graphs"] <= 4 and not counters["graph_break"]
    torch.compiler.reset()


@pytest.mark.parametrize("scores, sunk", [(CAPPED, False), (ScoreParams(0.4, 50), True)])
def test_training_on_cuda_takes_no_memory_for_scores(scores, sunk):
    """A plan on tensors without contents goes the same way, down to the gradients."""
    with FakeTensorMode(), use_policy(simulate_cuda=True, contents=False):
        x = torch.empty(1, 64, 10 * 16, dtype=torch.bfloat16, requires_grad=True)
        sinks = torch.empty(6, dtype=torch.bfloat16, requires_grad=True) if sunk else None
        saved: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.shape), t)[1], lambda t: t):
            y = sdpa.attend_packed(*heads_of(x, 2), scores, Segments.of((60, 4)), sinks)
        y.sum().backward()
        assert y.dtype == torch.bfloat16 and x.grad.shape == x.shape and (not sunk or sinks.grad.shape == (6,))
        assert not any(shape[-2:] == (64, 64) or shape[-2:] == (60, 60) for shape in saved)
