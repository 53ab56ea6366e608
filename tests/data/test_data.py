"""Prompts, the supervision mask, and the prepare scripts with their audit."""

import json

import pytest
import torch
from safetensors.torch import load_file

from helpers.rows import ROWS, write_rows
from helpers.tokenizers import bpe_tokenizer
from lit_gpt import Tokenizer
from lit_gpt.data import dataset
from lit_gpt.data.folder import SPLITS
from lit_gpt.errors import UserError
from lit_gpt.text.messages import instruction_messages
from lit_gpt.text.prompt_style import STYLES, PromptStyle

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "the dog"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "a task"},
]


@pytest.fixture(scope="module")
def tokenizer(llama) -> Tokenizer:
    return Tokenizer(llama)


def supervised_text(style: PromptStyle, tokenizer: Tokenizer, messages) -> list[str]:
    """The stretches of text that are supervised."""
    sample = style.encode_sample(messages, tokenizer)
    assert not any(answer.prompt_mismatch for answer in sample.answers)
    spans = [sample.ids[answer.start : answer.stop] for answer in sample.answers]
    return [tokenizer.decode(span, skip_special_tokens=False) for span in spans]


@pytest.mark.parametrize("name", STYLES)
def test_answers_and_their_end_tokens_are_supervised(tokenizer, name):
    end = "<|im_end|>" if name == "chatml" else "<|end|>"
    spans = supervised_text(PromptStyle.from_name(name, tokenizer), tokenizer, CHAT)
    assert [span.strip() for span in spans] == ["the dog" + end, "a task" + end]


@pytest.mark.parametrize("name", STYLES)
def test_generation_sees_what_training_saw(tokenizer, name):
    """The prompt's tokens are the beginning of the sample's, up to the first supervised one."""
    style = PromptStyle.from_name(name, tokenizer)
    messages = instruction_messages("the cat", "a dog", "the task")
    sample = style.encode_sample(messages, tokenizer)
    assert style.encode_prompt(messages[:1], tokenizer) == sample.ids[: sample.answers[0].start]


def test_alpaca_puts_the_input_apart(tokenizer):
    style = PromptStyle.from_name("alpaca", tokenizer)
    text = style.render(instruction_messages("Add.", "1 2"), tokenizer, answer=True)
    assert "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n" in text and "paired with an input" in text
    assert "### Input" not in style.render(instruction_messages("Add."), tokenizer, answer=True)
    assert "1 2" in PromptStyle.from_name("chatml", tokenizer).render(instruction_messages("Add.", "1 2"), tokenizer)


def test_own_template_file_and_its_mistakes(tokenizer, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
                    "{{ '<assistant>' if add_generation_prompt }}")  # fmt: skip
    style = PromptStyle.from_name(str(file), tokenizer)
    assert supervised_text(style, tokenizer, CHAT) == ["the dog<|end|>", "a task<|end|>"]
    for broken in ("{% for %}", "{{ messages.nothing.more }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"):
        file.write_text(broken)
        with pytest.raises(UserError, match="template"):
            PromptStyle.from_name(str(file), tokenizer).render(CHAT, tokenizer)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="mine.jinja: expected UTF-8 text"):
        PromptStyle.from_name(str(file), tokenizer)
    with pytest.raises(UserError, match="expected auto, checkpoint, plain"):
        PromptStyle.from_name("alpacca", tokenizer)


def test_chat_template_equals_transformers(llama, tmp_path):
    """The checkpoint's own template, token for token; its end of turn is a stop token."""
    from transformers import AutoTokenizer

    bpe_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    theirs.chat_template = STYLES["chatml"].replace("m.", "message.").replace("for m ", "for message ")
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer(tmp_path)
    style = PromptStyle.from_checkpoint(tmp_path, ours)
    expected = theirs.apply_chat_template(CHAT[:4], add_generation_prompt=True, tokenize=True, return_dict=False)
    assert style.encode_prompt(CHAT[:4], ours) == expected
    assert ours.token_id("<|im_end|>") in style.stop_ids and ours.eos_id in style.stop_ids


def test_prepare_json(cli, llama, tmp_path):
    flags = {"checkpoint_dir": llama, "data_path": write_rows(tmp_path / "r.jsonl"), "prompt_style": "plain"}
    result = cli("scripts/prepare_json.py", **flags, out_dir=tmp_path / "d", validation_fraction=0.2)
    assert result.code == 0 and "⟦the task" in result.out and "rows kept" in result.out
    train, validation = (dataset.Dataset(tmp_path / "d", split) for split in SPLITS)
    assert (len(train), len(validation)) == (16, 4)
    tokenizer = Tokenizer(llama)
    texts = {tokenizer.decode(s.tokens, skip_special_tokens=False) for d in (train, validation) for s in d}
    assert "describe the cat 3\n\na dogthe task 3<|end|>" in texts and len(texts) == 20
    answers = {tokenizer.decode(s.tokens[s.supervised == 1]) for s in train}
    assert answers <= {row["output"] for row in ROWS}
    # the same command gives the same data
    cli("scripts/prepare_json.py", **flags, out_dir=tmp_path / "e", validation_fraction=0.2)
    assert all((tmp_path / "d" / n).read_bytes() == (tmp_path / "e" / n).read_bytes() for n in
               ("train.safetensors", "validation.safetensors", "data.json"))  # fmt: skip


def test_json_csv_and_messages_say_the_same(cli, llama, tmp_path):
    rows = [{"q": row["instruction"], "a": row["output"]} for row in ROWS]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    (tmp_path / "r.csv").write_text("q,a\n" + "".join(f'"{row["q"]}",{row["a"]}\n' for row in rows))
    messages = [instruction_messages(row["q"], "", row["a"]) for row in rows]
    write_rows(tmp_path / "m.jsonl", [{"messages": m} for m in messages])
    seen = []
    for name in ("r.json", "r.csv", "m.jsonl"):
        flags = {"instruction_column": "q", "output_column": "a"} if name != "m.jsonl" else {}
        out = tmp_path / name.replace(".", "_")
        result = cli("scripts/prepare_json.py", checkpoint_dir=llama, data_path=tmp_path / name, out_dir=out,
                     validation_path=tmp_path / name, **flags)  # fmt: skip
        assert result.code == 0, result.err
        seen.append(load_file(out / "train.safetensors"))
    assert all(torch.equal(seen[0][k], other[k]) for other in seen for k in seen[0])


def test_alpaca_and_dolly_from_local_files(cli, llama, tmp_path):
    write_rows(tmp_path / "a.jsonl")
    dolly = [{"instruction": r["instruction"], "context": r["input"], "response": r["output"]} for r in ROWS]
    write_rows(tmp_path / "d.jsonl", dolly)
    for name in ("alpaca", "dolly"):
        out = tmp_path / name
        flags = {"data_path": tmp_path / f"{name[0]}.jsonl", "out_dir": out, "max_seq_length": 200}
        assert cli(f"scripts/prepare_{name}.py", checkpoint_dir=llama, **flags).code == 0
    one, other = (load_file(tmp_path / name / "train.safetensors") for name in ("alpaca", "dolly"))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_audit_counts_what_happens(cli, llama, tmp_path):
    rows = [*ROWS, {"instruction": "a", "output": " "}, {"instruction": "a", "output": "the cat " * 60},
            {"instruction": "the " * 100, "output": "b"}]  # fmt: skip
    flags = {"checkpoint_dir": llama, "data_path": write_rows(tmp_path / "r.jsonl", rows), "prompt_style": "plain",
             "max_seq_length": 60, "validation_path": write_rows(tmp_path / "v.jsonl")}  # fmt: skip
    result = cli("scripts/prepare_json.py", **flags, out_dir=tmp_path / "d")
    result.refused("1 rows have no supervised token", "--allow_unsupervised")
    assert not (tmp_path / "d").exists()
    result = cli("scripts/prepare_json.py", **flags, out_dir=tmp_path / "d", allow_unsupervised=True)
    assert result.code == 0
    audit = json.loads((tmp_path / "d" / "data.json").read_text())["audit"]["train"]
    assert audit["rows_kept"] == 21 and audit["rows_truncated"] == 2 and audit["rows_without_end_token"] == 1
    assert audit["rows_dropped"] == {"empty answer": 1, "no supervised token": 1} and audit["length_max"] == 60


def test_unmasked_inputs_are_supervised(cli, llama, tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content + eos_token + '\n' }}{% endfor %}")
    flags = {"checkpoint_dir": llama, "data_path": write_rows(tmp_path / "r.jsonl")}
    flags["prompt_style"] = tmp_path / "t.jinja"
    cli("scripts/prepare_json.py", **flags, mask_inputs=False, out_dir=tmp_path / "d")
    cli("scripts/prepare_json.py", **flags, out_dir=tmp_path / "e")
    audits = [json.loads((tmp_path / n / "data.json").read_text())["audit"]["train"] for n in "de"]
    assert (
        audits[0]["tokens_supervised"] == audits[0]["tokens"] - audits[0]["rows_kept"] > audits[1]["tokens_supervised"]
    )
    assert audits[0]["rows_without_end_token"] == 0  # what follows the end token does not count
    unmasked, masked = (dataset.Dataset(tmp_path / n, "train") for n in "de")
    assert unmasked.supervised.all() and unmasked.fingerprint != masked.fingerprint


def test_a_template_that_moves_text_is_reported(cli, llama, tmp_path):
    """As Mistral's, which puts the system prompt into the last question: answers that do not follow what they would."""
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' and loop.revindex <= 2 %}"
        "{{ messages[0].content }}{% endif %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    )
    rows = write_rows(tmp_path / "r.jsonl", [{"messages": CHAT}] * 4)
    result = cli("scripts/prepare_json.py", checkpoint_dir=llama, data_path=rows, out_dir=tmp_path / "d",
                 prompt_style=template)  # fmt: skip
    assert result.code == 0
    audit = json.loads((tmp_path / "d" / "data.json").read_text())["audit"]["train"]
    assert audit["answers_after_another_prompt"] == 3


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("r.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": \n', ["r.jsonl", "line 2", "not JSON"]),
        ("r.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n', ["line 2", "'output' is missing"]),
        ("r.jsonl", '{"instruction": "a", "output": 5}\n' * 2, ["line 1", "'output' is int"]),
        ("r.jsonl", "[1]\n", ["line 1", "expected an object"]),
        ("r.jsonl", "", ["holds no rows"]),
        ("r.jsonl", '{"messages": [{"role": "user"}]}\n' * 2, ["line 1", "content"]),
        ("r.jsonl", '{"instruction": "a", "output": " "}\n' * 2, ["r.jsonl: no usable row", "1 for: empty answer"]),
        ("r.json", '{"instruction": "a"}', ["expected a list"]),
        ("r.json", "[{]", ["line 1", "not JSON"]),
        ("r.csv", "instruction,output\na,b,c\n", ["line 2", "2 columns"]),
        ("r.csv", "instruction,output\n", ["holds no rows"]),
        ("r.jsonl", '{"instruction": "a", "output": "\\ud83d"}\n' * 2, ["line 1", "not Unicode"]),
        ("r.txt", "a", [".jsonl"]),
        ("r.jsonl", '{"instruction": "a", "output": "b"}\n', ["none of the 1 rows of", "--validation_path"]),
    ],
)
def test_bad_rows(cli, llama, tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    flags = {"checkpoint_dir": llama, "data_path": tmp_path / name, "out_dir": tmp_path / "d"}
    cli("scripts/prepare_json.py", **flags).refused(*words)
    assert not (tmp_path / "d").exists() and not list(tmp_path.glob(".d*"))


def test_bad_paths(cli, llama, tmp_path):
    rows = write_rows(tmp_path / "r.jsonl")
    flags = {"checkpoint_dir": llama, "data_path": rows, "out_dir": tmp_path}
    cli("scripts/prepare_json.py", **flags).refused("already exists", str(tmp_path))
    flags["out_dir"] = tmp_path / "d"
    cli("scripts/prepare_json.py", **flags | {"data_path": tmp_path / "no.jsonl"}).refused("no such file")
    cli("scripts/prepare_json.py", checkpoint_dir=llama, data_path=rows).refused("--out_dir", code=2)
    (tmp_path / "latin.jsonl").write_bytes('{"instruction": "ä"}'.encode("latin-1"))
    cli("scripts/prepare_json.py", **flags | {"data_path": tmp_path / "latin.jsonl"}).refused("not UTF-8")


def test_an_ordinary_folder_is_no_data_set(cli, llama, tmp_path):
    flags = {"checkpoint_dir": llama, "out_dir": tmp_path / "d"}
    write_rows(tmp_path / "rows.jsonl")
    for script in ("prepare_json", "prepare_alpaca", "prepare_dolly"):
        cli(f"scripts/{script}.py", **flags, data_path=tmp_path).refused("is a folder", f"mean {tmp_path}/rows.jsonl?")
    (tmp_path / "e").mkdir()
    cli("scripts/prepare_json.py", **flags, data_path=tmp_path / "e").refused("it holds nothing")


def test_rows_that_are_trained_on_and_validated_on_are_counted(cli, llama, tmp_path):
    flags = {"checkpoint_dir": llama, "data_path": write_rows(tmp_path / "r.jsonl")}
    same = cli("scripts/prepare_json.py", **flags, validation_path=flags["data_path"], out_dir=tmp_path / "d")
    assert same.code == 0 and "20 of the 20 validation rows are trained on" in same.out
    write_rows(tmp_path / "v.jsonl", [*ROWS[:3], {"instruction": "a", "output": "b"}])
    some = cli("scripts/prepare_json.py", **flags, validation_path=tmp_path / "v.jsonl", out_dir=tmp_path / "e")
    assert "3 of the 4 validation rows" in some.out
    assert "trained on" not in cli("scripts/prepare_json.py", **flags, out_dir=tmp_path / "f").out


def test_what_is_taken_otherwise_than_asked_is_said(cli, llama, tmp_path):
    flags = {"checkpoint_dir": llama, "data_path": write_rows(tmp_path / "r.jsonl"), "out_dir": tmp_path / "d"}
    result = cli("scripts/prepare_json.py", **flags, max_seq_length=100_000, validation_fraction=0)
    assert "--max_seq_length 100000: the model takes 256 tokens" in result.out
    assert "--validation_fraction 0: a run must validate on something; 1 of the 20 rows" in result.out


def test_damaged_or_foreign_data(tmp_path, llama, tokenizer, cli):
    cli("scripts/prepare_json.py", checkpoint_dir=llama, data_path=write_rows(tmp_path / "r.jsonl"),
        out_dir=tmp_path / "d")  # fmt: skip
    assert dataset.read_meta(tmp_path / "d", tokenizer)["format_version"] == dataset.FORMAT_VERSION
    path = tmp_path / "d" / "data.json"
    meta = json.loads(path.read_text())
    for change, words in (({"tokenizer": "x"}, "another tokenizer"), ({"format_version": 99}, "format version 99")):
        path.write_text(json.dumps(meta | change))
        with pytest.raises(UserError, match=words):
            dataset.read_meta(tmp_path / "d", tokenizer)
    whole = (tmp_path / "d" / "train.safetensors").read_bytes()
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        (tmp_path / "d" / "train.safetensors").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="prepare it again"):
            dataset.Dataset(tmp_path / "d", "train")
