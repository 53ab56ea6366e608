"""The step of one token as a list of native operations: the same tokens as without.

tests/generation/test_generation.py has it go through every layout.
"""

from functools import partial

import pytest
import torch

from helpers.methods import as_if_trained, with_adapter_v2, with_lora_and_adapter
from helpers.tiny_models import model_of
from lit_gpt import GPT, Config
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.generation.engine import generate
from lit_gpt.generation.sequence import DecodingRow, eager_step
from lit_gpt.generation.steps import FastStep
from lit_gpt.generation.steps.native import NativeStep
from lit_gpt.generation.steps.tape import Unsupported
from lit_gpt.kernels import build
from lit_gpt.methods import lora
from lit_gpt.model.gpt import quantize
from lit_gpt.model.kv_cache import row_view, truncate

pytestmark = pytest.mark.skipif(build.library("decode") is None, reason="needs a C++ compiler")


def same_tokens(model: GPT) -> None:
    """Past the window of Mistral and of Gemma 2; of answers that follow each other."""
    step = NativeStep(model)
    for prompt, new in ([5], 20), (list(range(40)), 9), ([7, 8, 9], 30):
        expected = list(generate(model, prompt, new, temperature=0))
        assert list(generate(model, prompt, new, temperature=0, step=step)) == expected


@pytest.mark.parametrize("format", [None, "int8", "int4", "nf4", "nf4-dq"])
@pytest.mark.parametrize(
    "family, layout, attach",
    [("llama", "mistral", with_lora_and_adapter), ("gemma", "gemma2", with_adapter_v2)],
    ids=["mistral", "gemma2"],
)
def test_every_method_and_format(family, layout, attach, format, tmp_path):
    model = model_of(family, layout, tmp_path)
    model = model if format is None else quantize(model, format)
    same_tokens(as_if_trained(attach(model)))


@pytest.mark.parametrize(
    "family, layout", [("falcon", "7b"), ("gpt_neox", "pythia"), ("mpt", "mpt"), ("qwen", "qwen3")]
)
def test_methods_together(family, layout, tmp_path):
    same_tokens(as_if_trained(with_lora_and_adapter(with_adapter_v2(model_of(family, layout, tmp_path)))))


def test_what_a_model_becomes_counts_from_the_next_answer_on(llama):
    """The same cache serves all answers, as in a conversation."""
    model = load_model(llama)
    step, cache = FastStep(model), model.kv_cache(1, 64)
    lora.attach(model, lora.LoRAConfig(r=4)).eval()
    for _ in range(3):
        expected = list(generate(model, [5, 6], 20, temperature=0))
        truncate(cache, 0)
        assert list(generate(model, [5, 6], 20, temperature=0, cache=cache, step=step)) == expected
        as_if_trained(model)
    assert isinstance(step.chosen, NativeStep)


def test_several_threads_find_the_same(llama):
    model, threads = load_model(llama), torch.get_num_threads()
    expected = list(generate(model, [5, 6, 7], 30, temperature=0))
    try:
        for torch_threads in (1, 2, 3):  # more than there may be cores
            torch.set_num_threads(torch_threads)
            assert list(generate(model, [5, 6, 7], 30, temperature=0, step=NativeStep(model))) == expected
    finally:
        torch.set_num_threads(threads)


def test_what_there_is_no_kernel_for_goes_through_the_model(llama, monkeypatch):
    model = load_model(llama)
    expected = list(generate(model, [5, 6, 7], 9, temperature=0))
    model.h[1].mlp.__class__ = type("Other", (type(model.h[1].mlp),), {})  # may do more than what it is derived from
    with pytest.raises(Unsupported, match="Other"):
        NativeStep(model)
    assert list(generate(model, [5, 6, 7], 9, temperature=0, step=FastStep(model))) == expected
    monkeypatch.setattr(build, "library", lambda name: None)
    with pytest.raises(Unsupported, match="compiler"):
        NativeStep(load_model(llama))
    with pytest.raises(Unsupported):
        NativeStep(load_model(llama, torch.float16))


def test_a_step_beyond_the_cache_is_refused(llama):
    model = load_model(llama)
    cache = model.kv_cache(1, 2)
    step, row = NativeStep(model), DecodingRow([5], 9, cache=cache)
    for token in (5, 6):
        step([row], cache)
        row.ids.append(token)
    with pytest.raises(IndexError, match="position 2"):
        step([row], cache)
    with pytest.raises(IndexError, match="token 320"):
        step([DecodingRow([320], 9, cache=cache)], cache)


@pytest.mark.parametrize("format", ["int8", "int4", "nf4", "nf4-dq"])
def test_in_bfloat16_it_is_nearer_to_float32_than_the_model_is(llama, format):
    """Its products are of whole numbers, of 16 bits on the side of the hidden states."""
    exact, model = (load_model(llama, dtype, quantize=format) for dtype in (torch.float32, torch.bfloat16))
    ids = list(range(40, 60))
    with torch.no_grad():
        expected = exact(torch.tensor([ids]), last=True)[:, -1]
        errors = []
        for step in (NativeStep(model), partial(eager_step, model)):
            cache = model.kv_cache(1, 20)
            model.hidden(torch.tensor([ids[:-1]]), cache=cache)
            errors.append((step([DecodingRow(ids, 1, cache=cache)], cache).float() - expected).norm() / expected.norm())
    assert errors[0] < errors[1] < 0.05


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_what_is_no_number_is_not_hidden_by_rounding(llama, format):
    model = load_model(llama, torch.bfloat16, quantize=format)
    model.h[0].norm_1.weight.data.fill_(torch.nan)
    cache = model.kv_cache(1, 2)
    assert NativeStep(model)([DecodingRow([5], 1, cache=cache)], cache).isnan().all()


@pytest.mark.parametrize("format", [None, "int8", "int4", "nf4", "nf4-dq"])
def test_several_rows_in_bfloat16_are_what_each_is_alone(format):
    """With more columns than a block holds, and not a multiple of anything."""
    config = Config(
        "odd", "falcon", n_layer=1, n_head=4, n_embd=120, intermediate_size=1129, vocab_size=150, block_size=16
    )
    torch.manual_seed(1)
    model = GPT(config) if format is None else quantize(GPT(config), format)
    model.to(torch.bfloat16).eval()
    cache = model.kv_cache(7, 4)
    rows = [DecodingRow([i + 3], 1, cache=row_view(cache, i)) for i in range(7)]
    together, alone = NativeStep(model)(rows, cache).clone(), NativeStep(model)
    for row, logits in zip(rows, together, strict=True):
        cache = model.kv_cache(1, 4)
        single = alone([DecodingRow(row.ids, 1, cache=cache)], cache)[0]
        torch.testing.assert_close(logits, single)
        assert (
            logits - eager_step(model, [DecodingRow(row.ids, 1, cache=model.kv_cache(1, 4))], None)[0]
        ).abs().max() < 0.02


@pytest.mark.parametrize("change", ["data", "dtype"])
def test_weights_that_lie_elsewhere_count_from_the_next_answer_on(llama, change):
    """Neither makes a parameter another, nor counts as writing to it."""
    model = load_model(llama, torch.bfloat16 if change == "dtype" else torch.float32)
    step = FastStep(model)
    list(generate(model, [5, 6], 5, temperature=0, step=step))
    if change == "dtype":
        model.float()
    else:
        for weight in model.parameters():
            weight.data = torch.randn_like(weight) / 10
    expected = list(generate(model, [5, 6], 20, temperature=0))
    assert list(generate(model, [5, 6], 20, temperature=0, step=step)) == expected
    assert isinstance(step.chosen, NativeStep)


@pytest.mark.parametrize("format", [None, "int8", "int4", "nf4", "nf4-dq"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype_changes_nothing(llama, format, dtype):
    model = load_model(llama, quantize=format)
    expected = list(generate(model, [5, 6], 20, temperature=0))
    torch.set_default_dtype(dtype)
    try:
        assert list(generate(model, [5, 6], 20, temperature=0)) == expected
        assert list(generate(model, [5, 6], 20, temperature=0, step=NativeStep(model))) == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_is_honoured(llama, register):
    model = load_model(llama)
    getattr(model.h[0].mlp, register)(lambda *_: None)
    with pytest.raises(Unsupported, match="SwiGLU"):
        NativeStep(model)
