"""The fast decoding step of token mixers that carry a state: the logits of the model's own operations."""

import copy

import pytest
import torch

from helpers.compare import off
from helpers.methods import EVERYTHING, as_if_trained, with_adapter_v2, with_lora_and_adapter
from helpers.tiny_models import model_of
from lit_gpt import GPT
from lit_gpt.generation.engine import generate
from lit_gpt.generation.sequence import DecodingRow, Step, eager_step
from lit_gpt.generation.steps.native import NativeStep
from lit_gpt.generation.steps.tape import Unsupported
from lit_gpt.kernels import build
from lit_gpt.methods import lora
from lit_gpt.model.gpt import quantize
from lit_gpt.model.kv_cache import KVCache, row_view

pytestmark = pytest.mark.skipif(build.library("decode") is None, reason="needs a C++ compiler")

SERVED = [
    ("qwen3_5", "qwen3_5"), ("granite_hybrid", "granite_hybrid"), ("nemotron_h", "nemotron_h"),
    ("falcon_mamba", "falcon_mamba"), ("lfm2", "lfm2-biased"),
]  # fmt: skip


@pytest.fixture(scope="module", params=SERVED, ids="-".join)
def hybrid(request, tmp_path_factory) -> GPT:
    return model_of(*request.param, tmp_path_factory.mktemp("hybrid"))


def begun(model: GPT, lengths: tuple[int, ...]) -> tuple[list[DecodingRow], KVCache]:
    """Return rows of so many tokens, all but the last of which are read, in a cache with a slot more."""
    cache = model.kv_cache(len(lengths) + 1, 40)
    rows = [DecodingRow(list(range(i, i + n)), 20, cache=row_view(cache, i)) for i, n in enumerate(lengths)]
    for row in rows:
        if len(row.ids) > 1:
            model.hidden(torch.tensor([row.ids[:-1]]), cache=row.cache)
    return rows, cache


def taken(model: GPT, step: Step, lengths: tuple[int, ...], turns: int) -> tuple[torch.Tensor, KVCache]:
    """Return the logits (turns, rows, vocabulary) of some steps in which each row goes on with known tokens."""
    (rows, cache), found = begun(model, lengths), []
    for turn in range(turns):
        found.append(step(rows, cache).float().clone())
        for i, row in enumerate(rows):
            row.ids.append(7 * i + turn)
    return torch.stack(found), cache


@torch.no_grad()
def same_logits(model: GPT, tolerance: float = 1e-5) -> None:
    """Of a row alone, of rows at several positions, and the states that they leave."""
    for lengths in (1,), (6,), (3, 9, 1, 5, 2):
        expected, states = taken(model, lambda rows, cache: eager_step(model, rows, cache), lengths, 6)
        found, own = taken(model, NativeStep(model, len(lengths)), lengths, 6)
        assert off(found, expected) < tolerance
        for ours, theirs in zip(own, states, strict=True):
            for a, b in zip(getattr(ours, "tensors", ()), getattr(theirs, "tensors", ()), strict=True):
                assert off(a.float(), b.float()) < tolerance


def test_logits_and_states(hybrid: GPT):
    same_logits(hybrid)


def test_of_a_quantized_base_with_lora(hybrid: GPT):
    model = quantize(copy.deepcopy(hybrid), "nf4")
    same_logits(as_if_trained(lora.attach(model, EVERYTHING).eval()))


@pytest.mark.parametrize("hybrid", SERVED[:1], ids="-".join, indirect=True)
@pytest.mark.parametrize("attach", [with_lora_and_adapter, with_adapter_v2])
def test_of_other_methods(hybrid: GPT, attach):
    same_logits(as_if_trained(attach(copy.deepcopy(hybrid))))


def test_in_bfloat16(hybrid: GPT):
    """The model rounds more of what lies between than the step does."""
    same_logits(copy.deepcopy(hybrid).bfloat16(), tolerance=0.03)


def test_answers_follow_each_other(hybrid: GPT):
    step = NativeStep(hybrid)
    for prompt, new in ([5], 12), (list(range(30)), 9), ([7, 8, 9], 12):
        expected = list(generate(hybrid, prompt, new, temperature=0))
        assert list(generate(hybrid, prompt, new, temperature=0, step=step)) == expected


@pytest.mark.parametrize("hybrid", SERVED[:1], ids="-".join, indirect=True)
def test_a_step_that_breaks_off_leaves_a_state_that_counts_for_nothing(hybrid: GPT, monkeypatch):
    (row,), cache = begun(hybrid, (4,))
    step = NativeStep(hybrid)
    monkeypatch.setattr(step.tape, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        step([row], cache)
    assert min(layer.length for layer in row.cache) == 0


@pytest.mark.parametrize("hybrid", SERVED[:1], ids="-".join, indirect=True)
def test_a_mixer_that_may_do_more_goes_through_the_model(hybrid: GPT):
    model = copy.deepcopy(hybrid)
    mixer = next(block.mixer for block in model.h if block.mixer is not None)
    mixer.__class__ = type("Other", (type(mixer),), {})
    with pytest.raises(Unsupported, match="Other"):
        NativeStep(model)
