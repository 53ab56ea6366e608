"""Answers that end before a text, and tokens that are made less likely once they stand there."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.rows import write_rows
from lit_gpt import Tokenizer
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.errors import UsageError
from lit_gpt.generation.args import SamplingArgs
from lit_gpt.generation.engine import generate, up_to_stop

GREEDY = {"temperature": 0, "max_new_tokens": 24, "precision": "fp32", "prompt_style": "plain"}


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["ab", "cd", "ef"], ["cd"], "ab"), (["abc", "def"], ["cd"], "ab"), (["a", "b", "c", "d"], ["bcd"], "a"),
        (["ab", "ab", "ac"], ["abac"], "ab"), (["abc"], ["x", "b"], "a"), (["abc"], [], "abc"),
        (["ab", "c"], ["cd"], "abc"), (["stop"], ["stop"], ""), ([], ["a"], ""), (["ab", "cd"], ["bcd", "bc"], "a"),
    ],
)  # fmt: skip
def test_nothing_of_a_stop_is_shown(pieces, stops, expected):
    assert "".join(up_to_stop(pieces, stops)) == expected


def test_stops_as_a_flag():
    assert SamplingArgs().stops == [] and SamplingArgs(stop="User:").stops == ["User:"]
    assert SamplingArgs(stop='["a", "b"]').stops == ["a", "b"]
    for wrong in ("[a", "[1]", '[""]'):
        with pytest.raises(UsageError, match="--stop"):
            _ = SamplingArgs(stop=wrong).stops


def test_an_answer_ends_before_a_stop(cli, llama, tmp_path):
    """On standard output and in a file of answers alike."""
    whole = cli("generate/base.py", checkpoint_dir=llama, prompt="the cat", **GREEDY).out[:-1]
    stop = whole[4:6]
    expected = whole[: whole.index(stop)]
    assert cli("generate/base.py", checkpoint_dir=llama, prompt="the cat", stop=stop, **GREEDY).out[:-1] == expected
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "the cat"}, {"prompt": "a dog"}])
    flags = {"checkpoint_dir": llama, "prompt_file": prompts, "out": tmp_path / "a.jsonl", "stop": json.dumps([stop])}
    assert cli("generate/base.py", **flags, **GREEDY).code == 0
    first = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])
    assert first["answer"] == expected and first["ended"]


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_repetition_penalty_is_that_of_transformers(llama, penalty):
    model, theirs = load_model(llama, torch.float32), AutoModelForCausalLM.from_pretrained(llama)
    prompt = Tokenizer(llama).encode("the cat and the dog").tolist()
    ours = list(generate(model, prompt, 20, temperature=0, repetition_penalty=penalty))
    idx = torch.tensor([prompt])
    expected = theirs.generate(idx, max_new_tokens=20, do_sample=False, repetition_penalty=penalty, eos_token_id=None,
                               attention_mask=torch.ones_like(idx))  # fmt: skip
    assert ours == expected[0, len(prompt) :].tolist()
