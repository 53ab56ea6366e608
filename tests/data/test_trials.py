"""The inputs of public reports, prepared as their writers meant them."""

import json
from pathlib import Path

import pytest

from helpers.paths import SHARED
from helpers.tokenizers import bpe_tokenizer
from lit_gpt import Tokenizer
from lit_gpt.data import dataset

TRIALS = SHARED / "trials"
SCRIPT = "scripts/prepare_json.py"
pytestmark = pytest.mark.skipif(not TRIALS.is_dir(), reason="the inputs of the trials are absent")


@pytest.fixture(scope="module")
def chat(llama, tmp_path_factory) -> Path:
    """A checkpoint folder with the special tokens of the chatml style."""
    folder = tmp_path_factory.mktemp("chat")
    fields = json.loads((llama / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(fields))
    bpe_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["additional_special_tokens"] = ["<|im_start|>", "<|im_end|>"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def prepare(cli, chat, tmp_path):
    """Prepare a file of the trials; return the result, what is supervised in each row, and the audit."""

    def run(name: str, style: str = "chatml", **flags):
        path = TRIALS / style if style.endswith(".jinja") else style
        out = tmp_path / Path(name).stem
        flags = {"validation_path": TRIALS / name} | flags
        result = cli(SCRIPT, checkpoint_dir=chat, data_path=TRIALS / name, prompt_style=path, out_dir=out, **flags)
        if result.code:
            return result, [], {}
        tokenizer, rows = Tokenizer(chat), dataset.Dataset(out, "train")
        learned = [tokenizer.decode(row.tokens[row.supervised == 1], skip_special_tokens=False) for row in rows]
        texts = [tokenizer.decode(row.tokens, skip_special_tokens=False) for row in rows]
        audit = json.loads((out / "data.json").read_text())["audit"]["train"]
        return result, list(zip(texts, learned, strict=True)), audit

    return run


@pytest.mark.parametrize("name", ["01_system_column", "01b_alpaca_system_history"])
def test_the_system_text_of_a_column_is_trained(prepare, name):
    _, rows, _ = prepare(f"{name}.jsonl")
    assert all(text.startswith("<|im_start|>system\nTalk like a sailor.<|im_end|>") for text, _ in rows)
    before = "Ahoy!<|im_end|>" if "history" in name else ""
    assert [learned for _, learned in rows] == [f"{before}Aye, answer {i}.<|im_end|>" for i in range(4)]


def test_tool_roles_and_other_names_of_speakers(prepare):
    _, rows, _ = prepare("02_tool_roles.jsonl", "tools.jinja")
    call = '<call>{"name": "weather", "arguments": {"town": 0}}</call><|im_end|>'
    assert rows[0][1] == call + "Seven degrees in town 0.<|im_end|>" and "<|im_start|>tool\n7 degrees" in rows[0][0]
    _, rows, _ = prepare("03_unknown_roles.jsonl")
    ends = "<|im_end|>"
    assert [learned.split(ends)[:2] for _, learned in rows] == [
        ["First.", "Second."], ["Third.", "Fourth."], ["Fifth.", "Sixth."]
    ]  # fmt: skip


def test_content_parts_prompts_and_plain_text(prepare):
    assert [learned for _, learned in prepare("04_content_parts.jsonl")[1]][0] == "Reply 0.<|im_end|>"
    assert [learned for _, learned in prepare("13_prompt_completion.jsonl")[1]][0] == "A0<|im_end|>"
    result, rows, _ = prepare("14_text.jsonl", "auto")
    assert "The tide 0 comes and goes." in rows[0][1] and "hold a text" in result.out
    assert "prompt style plain" in result.out


def test_arguments_as_text_are_those_of_the_object(prepare):
    rows = prepare("05_args_string.jsonl", "tools.jinja")[1]
    assert rows and rows == prepare("05b_args_object.jsonl", "tools.jinja")[1]


def test_nulls_of_arrow_are_not_learned(prepare):
    pytest.importorskip("pyarrow")
    _, expected, _ = prepare("06_null_filled_source.jsonl", "tools.jinja")
    _, rows, audit = prepare("06_null_filled.parquet", "tools.jinja")
    assert rows and rows == expected and audit["null_fields_left_out"] > 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("07_falsy.jsonl", ["line 1", "'output' is int", "more rows cannot be used"]),
        ("07b_truthy.jsonl", ["line 1", "'output' is int"]),
        ("08_unclosed_quote.csv", ["line 3", "a quote opens here"]),
        ("09_duplicate_header.csv", ["two columns are named 'output'"]),
        ("11_python_repr.csv", ["line 2", "'messages'", "Python's own spelling"]),
        ("12_huge_int.jsonl", ["line 2", "thousands of digits"]),
    ],
)
def test_refused_in_one_line(prepare, name, words):
    prepare(name)[0].refused(name, *words)


def test_marks_of_byte_order_are_no_text(prepare):
    assert len(prepare("09c_bom_crlf.csv")[1]) == 3
    assert all(text.startswith("<|im_start|>") for text, _ in prepare("10_rows.jsonl", "10_bom_template.jinja")[1])


def test_special_tokens_in_messages_are_counted(prepare):
    assert prepare("15_special_in_answer.jsonl")[2]["special_tokens_in_messages"] == 4


def test_a_template_that_wants_a_system_message(prepare):
    _, rows, _ = prepare("21_rows_with_system.jsonl", "21_strict_system.jinja")
    assert rows[0][1] == "A0<|im_end|>"
    prepare("10_rows.jsonl", "21_strict_system.jinja")[0].refused("line 1", "a system message is needed")


def test_reasoning_removed_from_history_is_not_learned(prepare):
    _, rows, audit = prepare("22_inline_think.jsonl", "22_think.jinja")
    assert rows[0][1] == "<think>t2</think>A2<|im_end|>" and audit["answers_not_shown_in_full"] == 4


def test_an_empty_turn_is_not_learned(prepare):
    _, rows, audit = prepare("25_empty_turn.jsonl")
    assert rows[0][1] == "A0.<|im_end|>" and audit["empty_answers_not_learned"] == 4
