"""Answers for programs."""

import shutil

import pytest

from helpers.methods import LORAS, lora_files
from lit_gpt import LitGPT, Tokenizer
from lit_gpt.errors import UsageError, UserError
from lit_gpt.text.prompt_style import PromptStyle


def test_it_answers_as_the_scripts_do(cli, llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "base")
    style = PromptStyle.from_name("alpaca", Tokenizer(folder)).to_dict()
    (path,) = lora_files(folder, LORAS[:1], style=style)
    flags = {"checkpoint_dir": folder, "precision": "fp32", "max_new_tokens": 12, "seed": 5, "prompt": "the cat"}
    sampling = {"temperature": 0.9, "top_k": 30, "min_p": 0.01}
    for script, finetuned in (("generate/base.py", None), ("generate/lora.py", path)):
        own = {"lora_path": finetuned, "merge": "false"} if finetuned else {}
        model = LitGPT.load(folder, finetuned, precision="fp32")
        found = model.generate("the cat", max_new_tokens=12, seed=5, **sampling)
        assert cli(script, **flags, **own, **sampling).out == found + "\n"
        assert found == "".join(model.stream("the cat", max_new_tokens=12, seed=5, **sampling))
    plain = LitGPT.load(str(folder), precision="fp32", prompt_style="chatml")
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "the cat"}]
    whole = plain.generate(messages, temperature=0, max_new_tokens=12)
    assert whole != plain.generate("the cat", temperature=0, max_new_tokens=12)
    assert (
        plain.generate(messages, temperature=0, max_new_tokens=12, stop=[whole[3:5]])
        == whole[: whole.index(whole[3:5])]
    )


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens: expected a whole number above 0, got -1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: expected a whole number above 0"),
        ({"temperature": -1}, "temperature: expected a number, 0 or more"),
        ({"temperature": None}, "temperature: expected a number, 0 or more"),
        ({"top_k": 0}, "top_k: expected a whole number above 0 or nothing"),
        ({"top_p": 1.5}, "top_p: expected a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a number above 0"),
        ({"stop": "ab"}, "stop: expected a list of texts, got 'ab'"),
        ({"seed": "x"}, "seed: expected a whole number, 0 or more, got 'x'"),
        ({"temprature": 1}, "temprature: no such option; did you mean temperature?"),
        ({"max_tokens": 5}, "max_tokens: no such option; did you mean max_new_tokens?"),
        ({"beams": 5}, "beams: no such option; expected max_new_tokens, temperature, "),
    ],
)
def test_options_that_there_are_not(llama, option, words):
    """They are refused at once, as the scripts refuse such flags."""
    with pytest.raises(UsageError) as refused:
        LitGPT.load(llama).stream("the cat", **option)
    assert str(refused.value).startswith(words)


def test_options_that_flags_take_are_taken(llama):
    model = LitGPT.load(llama)
    some = {"temperature": 1, "top_k": None, "top_p": 1, "stop": ("x", "y"), "seed": 0, "max_new_tokens": 2}
    assert isinstance(model.generate("the cat", **some), str)


def test_what_cannot_be_answered(llama):
    model = LitGPT.load(llama)
    assert isinstance(model.tokenizer, Tokenizer)
    with pytest.raises(UserError, match="exceed the model's context"):
        model.generate("the cat", max_new_tokens=1000)
