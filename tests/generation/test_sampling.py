"""Sampling against transformers' own rules, and the strings that end an answer."""

import json

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from lit_gpt import Tokenizer
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.generation.engine import generate
from lit_gpt.generation.sampling import Sampling, penalize, sample
from lit_gpt.generation.stopping import AnswerText, answer_text


def test_the_repetition_penalty_is_that_of_transformers():
    torch.manual_seed(0)
    logits, ids = torch.randn(50), [3, 3, 7, 49]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([ids]), logits.clone()[None])[0]
    assert torch.equal(penalize(logits, 1.3, ids), expected)
    assert int(sample(logits, Sampling(0.0, repetition_penalty=1.3), None, ids)) == int(expected.argmax())


def test_min_p_keeps_what_transformers_keeps():
    torch.manual_seed(0)
    logits = torch.randn(30)
    kept = MinPLogitsWarper(0.2)(torch.tensor([[0]]), logits.clone()[None])[0].isfinite().nonzero().flatten().tolist()
    assert len(kept) > 1
    assert {int(sample(logits, Sampling(min_p=0.2), None)) for _ in range(500)} == set(kept)


@pytest.mark.parametrize("length", range(1, 6))
def test_a_stop_string_ends_the_text_wherever_its_tokens_are_cut(llama, length):
    """The text before it comes whole, nothing of it or behind it comes at all, and no more tokens are taken."""
    tokenizer = Tokenizer(llama)
    ids = tokenizer.encode("the cat, süßer and the dog: a task").tolist()
    text = tokenizer.decode(ids)
    for start in range(len(text) - length):
        stop, taken = text[start : start + length], iter(ids)
        pieces = list(answer_text(tokenizer, taken, [stop, "nowhere"]))
        assert "".join(pieces) == text[: text.index(stop)] and "" not in pieces
    assert "".join(answer_text(tokenizer, ids, ["taskx", "k "])) == text  # what was held back comes in the end


def test_of_several_stop_strings_the_first_in_the_text_holds(llama):
    tokenizer = Tokenizer(llama)
    answer = AnswerText(tokenizer, ["dog", "and the d", ""])
    shown = [answer.push(token) for token in tokenizer.encode("the cat and the dog").tolist()]
    assert "".join(shown) == "the cat " and answer.ended and answer.rest() == ""


def test_the_scripts_stop_at_a_string(cli, llama, tmp_path):
    flags = {"checkpoint_dir": llama, "temperature": 0, "precision": "fp32", "max_new_tokens": 12}
    tokenizer = Tokenizer(llama)
    ids = generate(
        load_model(llama), tokenizer.encode("the cat").tolist(), 12, temperature=0, stop_ids=[tokenizer.eos_id]
    )
    whole = tokenizer.decode(list(ids))
    stop = whole[5:7]
    expected = whole[: whole.index(stop)]
    assert cli("generate/base.py", **flags, prompt="the cat", stop=stop).out == expected + "\n"
    (tmp_path / "p.jsonl").write_text('{"prompt": "the cat"}\n')
    asked = {"prompt_file": tmp_path / "p.jsonl", "out": tmp_path / "a.jsonl"}
    assert cli("generate/base.py", **flags, **asked, stop=stop).code == 0
    assert json.loads((tmp_path / "a.jsonl").read_text())["answer"] == expected
    penalized = cli("generate/base.py", **flags, prompt="the cat", repetition_penalty=0.05).out
    assert penalized != whole + "\n"
