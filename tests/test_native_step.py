"""The step of one token as a list of native operations: the same tokens as without."""

import pytest
from conftest import Tiny
from test_decoding import as_if_trained, model_of, with_adapter_v2, with_lora_and_adapter

from lit_gpt import GPT, native, quantize
from lit_gpt.generation import generate
from lit_gpt.native_step import NativeStep, Unsupported

pytestmark = pytest.mark.skipif(native.library("decode") is None, reason="needs a C++ compiler")


def same_tokens(model: GPT) -> None:
    """Past the window of Mistral and of Gemma 2; of answers that follow each other."""
    step = NativeStep(model)
    for prompt, new in ([5], 20), (list(range(40)), 9), ([7, 8, 9], 30):
        expected = list(generate(model, prompt, new, temperature=0))
        assert list(generate(model, prompt, new, temperature=0, step=step)) == expected


def test_every_layout(tiny: Tiny):
    model = GPT.from_checkpoint(tiny.folder)
    if model.config.n_expert:
        with pytest.raises(Unsupported, match="MoE"):
            NativeStep(model)
    else:
        same_tokens(model)


@pytest.mark.parametrize("format", [None, "int8", "int4", "nf4", "nf4-dq"])
@pytest.mark.parametrize("attach", [with_lora_and_adapter, with_adapter_v2], ids=["lora-adapter", "adapter_v2"])
@pytest.mark.parametrize(
    "family, layout", [("llama", "mistral"), ("falcon", "7b"), ("gemma", "gemma2"), ("gpt_neox", "pythia")]
)
def test_every_method_and_format(family, layout, attach, format, tmp_path):
    model = model_of(family, layout, tmp_path)
    model = model if format is None else quantize.attach(model, format)
    same_tokens(as_if_trained(attach(model)))
