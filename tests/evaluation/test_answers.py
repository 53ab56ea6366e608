"""Answers scored by a task's metric, of the base beside a finetune."""

import json
from pathlib import Path

import pytest

from helpers.rows import write_rows
from lit_gpt.errors import UsageError, UserError
from lit_gpt.text.metrics import MetricArgs

SCRIPT = "eval/answers.py"


@pytest.mark.parametrize(
    ("flags", "wanted", "answer", "scores"),
    [
        ({}, "a cat", " a cat\n", {"exact": 1}),
        ({}, "a cat", "A cat", {"exact": 0}),
        ({"metric": "contains,exact"}, "cat", "the cat.", {"contains": 1, "exact": 0}),
        ({"metric": "regex", "pattern": "#### (.*)"}, "so #### 4", "well #### 4", {"regex": 1}),
        ({"metric": "regex", "pattern": "#### (.*)"}, "so 4", "well 4", {"regex": 0}),
        ({"metric": "number"}, "1,200", "is 1200.0", {"number": 1}),
        ({"metric": "number"}, "5", "none", {"number": 0}),
        ({"metric": "number", "tolerance": 0.1}, "-10", "-10.9", {"number": 1}),
        ({"metric": "json"}, '{"a": 1, "b": "x"}', 'It is {"b": "y", "a": 1}', {"json": 0.5, "json.a": 1, "json.b": 0}),
        ({"metric": "json", "fields": "a"}, '{"a": null, "b": 2}', '{"a": null}', {"json": 1, "json.a": 1}),
        ({"metric": "json", "tolerance": 0.5}, '{"a": 10}', '{"a": true}', {"json": 0, "json.a": 0}),
        ({"metric": "json"}, '{"a": 1}', "{", {"json": 0, "json.a": 0}),
    ],
)
def test_metrics(flags, wanted, answer, scores):
    found: dict[str, float] = {}
    for metric in MetricArgs(**flags).metrics().values():
        found |= metric("", wanted, answer)
    assert found == scores


def test_what_metrics_refuse(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("def half(question, wanted, answer): return 0.5\ndef text(*_): return 'x'\n")
    assert MetricArgs(metric=f"{own}:half").metrics()[f"{own}:half"]("", "", "") == {"half": 0.5}
    for flags, words in (
        ({"metric": "f1"}, "--metric f1: expected exact"),
        ({"metric": "regex"}, "needs --pattern"),
        ({"metric": "regex", "pattern": "("}, "not a regular expression"),
        ({"metric": "own.py:f"}, "no such file own.py"),
        ({"metric": f"{own}:f"}, "has no function f"),
    ):
        with pytest.raises((UsageError, UserError), match=words.replace("(", r"\(")):
            MetricArgs(**flags).metrics()
    for flags, pair, words in (
        ({"metric": f"{own}:text"}, ("a", "b"), "expected a function"),
        ({"metric": "json"}, ("a", "{}"), "is no JSON object"),
        ({"metric": "json", "fields": "c"}, ('{"a": 1}', "{}"), "--fields c"),
    ):
        with pytest.raises(UserError, match=words):
            next(iter(MetricArgs(**flags).metrics().values()))("", *pair)


def test_a_finetune_beside_its_base(cli, flags, llama, data_dir, tmp_path: Path):
    """The base knows nothing; what was trained on the very rows answers them; misses are in the file."""
    trained = flags | {"max_steps": 60, "lora_key": "true", "lora_projection": "true", "lora_dropout": 0}
    trained |= {"save_interval": 100, "eval_interval": 100}
    assert cli("finetune/lora.py", **trained).code == 0
    ours = {"checkpoint_dir": llama, "finetuned_path": flags["out_dir"] / "lit_model_lora_finetuned.pth"}
    ours |= {"precision": "fp32", "out": tmp_path / "misses.jsonl", "json": "true"}
    result = cli(SCRIPT, **ours, data_dir=data_dir, split="train", samples=8, metric="exact,contains")
    figures = json.loads(result.out)
    misses = [json.loads(line) for line in ours["out"].read_text().splitlines()]
    assert figures["questions"] == 8 and figures["misses"] == len(misses)
    assert figures["exact"]["finetuned"] == 1 - len(misses) / 8 > figures["exact"]["base"] == 0
    assert all(miss["wanted"] != miss["finetuned"] and "base" in miss for miss in misses)
    rows = write_rows(tmp_path / "r.jsonl")
    result = cli(SCRIPT, **ours | {"json": "false"}, data_path=rows, samples=3, compare="false")
    assert result.code == 0 and "finetuned" in result.out and "base" not in result.out, result.err
    assert "3 questions" in result.out
    cli(SCRIPT, **ours).refused("--data_dir", "--data_path", code=2)
