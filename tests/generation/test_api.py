"""Answers for programs."""

import shutil

import pytest

from helpers.methods import LORAS, lora_files
from lit_gpt import LitGPT, Tokenizer
from lit_gpt.errors import UserError
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


def test_what_cannot_be_answered(llama):
    model = LitGPT.load(llama)
    assert isinstance(model.tokenizer, Tokenizer)
    with pytest.raises(UserError, match="exceed the model's context"):
        model.generate("the cat", max_new_tokens=1000)
