"""The compiled step of one token: the same tokens as without."""

import shutil

import pytest

from helpers.methods import as_if_trained, with_adapter_v2, with_lora_and_adapter
from helpers.tiny_models import model_of
from lit_gpt.errors import UsageError
from lit_gpt.generation.engine import generate
from lit_gpt.generation.steps.compiled import CompiledStep


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "family, layout, attach",
    [
        pytest.param("llama", "mistral", with_lora_and_adapter, id="mistral", marks=pytest.mark.slow),
        pytest.param("gemma", "gemma2", lambda m: m, id="gemma2", marks=pytest.mark.slow),
        pytest.param("falcon", "7b", with_adapter_v2, id="falcon"),
    ],
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
