"""The compiled step of one token: the same tokens as without."""

import shutil

import pytest
import torch
from conftest import tiny_hf_model

from lit_gpt import GPT
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.conversion import hf, hf_shards
from lit_gpt.errors import UsageError
from lit_gpt.generation.compiled_step import CompiledStep
from lit_gpt.generation.engine import generate
from lit_gpt.methods import adapter, adapter_v2, lora


def model_of(family: str, layout: str, folder, **fields) -> GPT:
    tiny_hf_model(family, layout, **fields).save_pretrained(folder)
    hf.convert(folder, hf_shards.StoredWeights(folder))
    return load_model(folder)


def with_lora_and_adapter(model: GPT) -> GPT:
    """One layer has a prompt, the other none."""
    return adapter.attach(lora.attach(model, lora.LoRAConfig(r=4)), adapter.AdapterConfig(start_layer=1))


def with_adapter_v2(model: GPT) -> GPT:
    return adapter_v2.attach(model, adapter_v2.CONFIG(start_layer=0))


def as_if_trained(model: GPT) -> GPT:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "family, layout, attach",
    [("llama", "mistral", with_lora_and_adapter), ("gemma", "gemma2", lambda m: m), ("falcon", "7b", with_adapter_v2)],
    ids=["mistral", "gemma2", "falcon"],
)
def test_compiled_tokens_are_the_same(family, layout, attach, tmp_path):
    """Past the window of Mistral and of Gemma 2; with caches of several sizes, compiled once."""
    model = as_if_trained(attach(model_of(family, layout, tmp_path)))
    step = CompiledStep(model)
    for prompt, new in ([5], 20), (list(range(40)), 9), ([7, 8, 9], 30):
        expected = list(generate(model, prompt, new, temperature=0))
        assert list(generate(model, prompt, new, temperature=0, step=step)) == expected


def test_what_cannot_be_compiled_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="routed experts"):
        CompiledStep(model_of("mixtral", "mixtral", tmp_path / "moe"))
    model = model_of("llama", "llama", tmp_path / "llama")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match="C\\+\\+ compiler"):
        CompiledStep(model)
