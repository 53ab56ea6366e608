"""A file of prompts answered into another: complete, in order, resumable, and as if each prompt were alone."""

import fcntl
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from helpers.cli import Result, spawn
from helpers.methods import LORAS, lora_files
from helpers.tiny_models import tiny_hf_model
from helpers.tokenizers import bpe_tokenizer
from lit_gpt import Tokenizer
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.conversion import hf, hf_shards
from lit_gpt.generation.engine import generate
from lit_gpt.methods import finetuned_model, lora
from lit_gpt.text.prompt_style import PromptStyle

SCRIPT = "generate/base.py"
ROWS = [
    {"prompt": "the cat", "id": 7},
    {"instruction": "describes", "input": "a task"},
    {"messages": [{"role": "user", "content": "the dog"}]},
    {"prompt": " 日本語 👩‍👩‍👧  "},
    {"prompt": "a"},
]
GREEDY = {"temperature": 0, "precision": "fp32", "max_new_tokens": 30}


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(params=["bpe", "sentencepiece"])
def folder(request, tmp_path, spm_model) -> Path:
    """A model that writes arbitrary tokens, pieces of characters among them."""
    folder = tmp_path / "model"
    size = 300 if request.param == "bpe" else 420
    tiny_hf_model("llama", "llama", vocab_size=size, max_position_embeddings=128).save_pretrained(folder)
    if request.param == "bpe":
        bpe_tokenizer(folder)
    else:
        (folder / "tokenizer.model").write_bytes(spm_model)
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    hf.convert(folder, hf_shards.StoredWeights(folder))
    return folder


def test_answers_are_those_that_are_streamed_for_each_alone(cli, folder, tmp_path):
    """To the byte, and with all that a line had, in the lines' order."""
    flags = {"checkpoint_dir": folder, **GREEDY}
    out = tmp_path / "new" / "answers.jsonl"
    result = cli(SCRIPT, **flags, prompt_file=write(tmp_path / "p.jsonl", ROWS), out=out, batch_size=2)
    assert result.code == 0 and "5 answers" in result.err and result.out == ""
    found = read(out)
    assert [{k: row[k] for k in asked} for row, asked in zip(found, ROWS, strict=True)] == ROWS
    assert [row["row"] for row in found] == [1, 2, 3, 4, 5]
    assert any("\ufffd" in row["answer"] for row in found) and any(not row["ended"] for row in found)
    for row, text, context in zip(found, ("the cat", "describes", "the dog", ROWS[3]["prompt"], "a"),
                                  ("", "a task", "", "", ""), strict=True):  # fmt: skip
        assert cli(SCRIPT, **flags, prompt=text, input=context).out == row["answer"] + "\n"
    before = out.read_bytes()
    again = cli(SCRIPT, **flags, prompt_file=tmp_path / "p.jsonl", out=out)
    assert again.code == 0 and "5 of 5 rows are answered already" in again.err and out.read_bytes() == before


def test_sampling_depends_on_seed_and_row_alone(cli, llama, tmp_path):
    rows = [{"prompt": text} for text in ("the cat", "the", "the cat", "a task that", "dog")]

    def answers(rows: list, **flags) -> list[str]:
        out = tmp_path / "answers.jsonl"
        out.unlink(missing_ok=True)
        flags = {"checkpoint_dir": llama, "precision": "fp32", "temperature": 1.0, "out": out} | flags
        assert cli(SCRIPT, **flags, prompt_file=write(tmp_path / "p.jsonl", rows)).code == 0
        return [row["answer"] for row in read(out)]

    found = answers(rows, batch_size=4)
    assert found == answers(rows, batch_size=1) and found != answers(rows, batch_size=4, seed=1)
    assert found[0] != found[2]  # the same prompt in another row
    assert answers([*rows[:2], {"prompt": "and the dog"}, *rows[3:]])[3:] == found[3:]


@pytest.mark.subprocess
def test_a_killed_run_goes_on_where_it_stopped(cli, llama, tmp_path):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "the cat and " * (i % 7 + 1)} for i in range(40)])
    flags = {"checkpoint_dir": llama, "prompt_file": prompts, "precision": "fp32", "batch_size": 3}
    out, whole = tmp_path / "answers.jsonl", tmp_path / "whole.jsonl"
    process = spawn(SCRIPT, **flags, out=out)
    while not out.exists() or out.read_bytes().count(b"\n") < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    done = out.read_bytes().rpartition(b"\n")[0].splitlines()
    assert 4 <= len(done) < 40
    out.write_bytes(b"\n".join(done) + b'\n{"prompt": "the cat and ", "answ')
    result = cli(SCRIPT, **flags, out=out)
    assert result.code == 0 and f"{len(done)} of 40 rows are answered already" in result.err
    assert f"{40 - len(done)} answers" in result.err and "was cut short" in result.err
    assert cli(SCRIPT, **flags, out=whole).code == 0
    assert read(out) == read(whole) and {*done} < {*out.read_bytes().splitlines()}


def test_lines_that_cannot_be_answered_are_told_and_the_others_are(cli, llama, tmp_path):
    bad = [
        "{not JSON",
        [1],
        {"question": "x"},
        {"prompt": "a", "messages": []},
        {"prompt": 3},
        {"prompt": "a", "answer": "b"},
        {"prompt": "the cat " * 200},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": "a"},
        '{"prompt": "\\ud83d"}',
        {"prompt": ""},
        {"prompt": "a", "lora_path": "nowhere.pth"},
        {"prompt": "a", "tools": [{}]},
    ]
    prompts = write(tmp_path / "p.jsonl", ["", {"prompt": "the cat"}, *bad, {"prompt": "a"}])
    flags = {"checkpoint_dir": llama, "prompt_file": prompts, "out": tmp_path / "a.jsonl", **GREEDY}
    result = cli(SCRIPT, **flags)
    result.refused("13 of 15 rows are not answered", f"{prompts}: line 3: not JSON", "a.jsonl")
    told = [line for line in result.err.splitlines() if line.startswith(f"{prompts}: line ")]
    assert sorted(int(line.removeprefix(f"{prompts}: line ").partition(":")[0]) for line in told) == [*range(3, 16)]
    assert any("exceed the model's context of 256" in line for line in told)
    assert [row["prompt"] for row in read(tmp_path / "a.jsonl")] == ["the cat", "a"]
    write(prompts, [{"prompt": "the cat"}, {"prompt": "mended"}, *bad[1:], {"prompt": "a"}])
    assert "12 of 15" in cli(SCRIPT, **flags).refused()
    assert [row["prompt"] for row in read(tmp_path / "a.jsonl")] == ["the cat", "mended", "a"]


@pytest.mark.parametrize(
    ("change", "words", "code"),
    [
        ({"out": None}, ["p.jsonl", "add --out"], 2),
        ({"prompt": "a", "prompt_file": None}, ["--out", "--prompt_file FILE.jsonl"], 2),
        ({"prompt_file": "p.txt"}, ["--out", "--prompt_file FILE.jsonl"], 2),
        ({"prompt_file": "nowhere.jsonl"}, ["nowhere.jsonl: no such file"], 1),
        ({"prompt_file": "empty.jsonl"}, ["empty.jsonl: holds no prompts"], 1),
        ({"num_samples": 2}, ["--num_samples"], 2),
        ({"input": "x"}, ["--input"], 2),
        ({"compile": "true"}, ["--compile true", "--batch_size 1"], 2),
        ({"batch_size": 0}, ["--batch_size"], 2),
        ({"out": "other.jsonl"}, ["--out other.jsonl: line 2 is no answer"], 1),
        ({"out": "notes.json"}, ["--out notes.json: line 1 is no answer"], 1),
        ({"out": "p.jsonl"}, ["--out p.jsonl: is the file of the prompts"], 2),
        ({"out": "unended.jsonl"}, ["--out unended.jsonl: line 1 is no answer"], 1),
        ({"temperature": 0.5}, ["--out a.jsonl: line 1 was answered", "other flags"], 1),
        ({"prompt_file": "q.jsonl"}, ["--out a.jsonl: line 1 answers another prompt than row 1 of q.jsonl"], 1),
    ],
)
def test_refusals(cli, llama, tmp_path, monkeypatch, change, words, code):
    monkeypatch.chdir(tmp_path)
    answered = {"prompt": "a", "answer": "b", "ended": True, "row": 1, "settings": ""}
    write(Path("p.jsonl"), [{"prompt": "a"}])
    write(Path("q.jsonl"), [{"prompt": "b"}])
    write(Path("empty.jsonl"), [])
    Path("notes.json").write_text('{"my": "settings"}')
    Path("unended.jsonl").write_text('{"prompt": "a"}')
    flags = {"checkpoint_dir": llama, "prompt_file": "p.jsonl", "out": "a.jsonl", "max_new_tokens": 2}
    assert cli(SCRIPT, **flags).code == 0
    write(Path("other.jsonl"), [answered | {"settings": read(Path("a.jsonl"))[0]["settings"]}, {"prompt": "a"}])
    before = {path: path.read_bytes() for path in Path().iterdir()}
    cli(SCRIPT, **{k: v for k, v in (flags | change).items() if v is not None}).refused(*words, code=code)
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_lines_with_loras_of_their_own(cli, llama, tmp_path):
    """In one batch; a line without one takes the script's. Each in the style that it was trained in."""
    folder = shutil.copytree(llama, tmp_path / "base")
    plain, alpaca = (PromptStyle.from_name(name, Tokenizer(folder)).to_dict() for name in ("plain", "alpaca"))
    paths = lora_files(folder, LORAS, style=plain)
    contents = torch.load(paths[1])
    torch.save(contents | {"prompt_style": alpaca}, paths[1])
    rows = [{"prompt": "the cat", "lora_path": str(paths[i])} for i in (1, 2, 3, 1)] + [{"prompt": "the cat"}]
    prompts, out = write(tmp_path / "p.jsonl", rows), tmp_path / "a.jsonl"
    flags = {"checkpoint_dir": folder, "prompt_file": prompts, **GREEDY}
    assert cli("generate/lora.py", **flags, lora_path=paths[0], out=out).code == 0
    expected = [told(folder, paths[i]) for i in (1, 2, 3, 1, 0)]
    assert [row["answer"] for row in read(out)] == expected and len({*expected}) > 2
    assert cli(SCRIPT, **flags, out=tmp_path / "b.jsonl").code == 0
    assert [row["answer"] for row in read(tmp_path / "b.jsonl")] == [*expected[:4], told(folder, None)]
    cli("generate/lora.py", **flags, lora_path=paths[0], out=tmp_path / "c.jsonl", merge="true").refused(
        "--merge true", code=2
    )
    cli("generate/full.py", **flags, out=tmp_path / "c.jsonl").refused("p.jsonl: has lines with a lora_path")
    torch.save(contents | {"base": "0123"}, paths[3])
    cli(SCRIPT, **flags, out=tmp_path / "d.jsonl").refused("3.pth: trained on another base")
    assert not (tmp_path / "d.jsonl").exists() and not (tmp_path / "c.jsonl").exists()


def test_one_base_for_all_lines(cli, llama, tmp_path):
    """A LoRA's line does not change what the others are answered by."""
    folder = shutil.copytree(llama, tmp_path / "base")
    paths = lora_files(folder, LORAS, style=PromptStyle.from_name("plain", Tokenizer(folder)).to_dict())
    for path, format in zip(paths[:3], ("nf4", "int8", "nf4"), strict=True):
        torch.save(torch.load(path) | {"quantize": format}, path)
    flags = {"checkpoint_dir": folder, "out": tmp_path / "a.jsonl", **GREEDY}

    def answer(*loras: Path | None, **more) -> Result:
        rows = [{"prompt": "the cat"} | ({"lora_path": str(path)} if path else {}) for path in loras]
        return cli(SCRIPT, **flags, **more, prompt_file=write(tmp_path / "p.jsonl", rows))

    answer(paths[0], None).refused("0.pth: trained on a base in nf4; add --quantize nf4 for all")
    answer(paths[0], paths[3]).refused("0.pth: trained on a base in nf4; add --quantize nf4 for all")
    answer(paths[2], paths[1]).refused("1.pth: trained on a base in int8, ", "2.pth on one in nf4; use one at a time")
    assert not (tmp_path / "a.jsonl").exists()
    assert answer(paths[0], None, paths[3], quantize="nf4").code == 0


def test_the_same_model_under_another_name_goes_on(cli, llama, tmp_path):
    """And flags of the sampling matter where there is any."""
    prompts, link = write(tmp_path / "p.jsonl", [{"prompt": "a"}]), tmp_path / "link"
    link.symlink_to(llama)
    flags = {"prompt_file": prompts, "out": tmp_path / "a.jsonl", **GREEDY}
    assert cli(SCRIPT, checkpoint_dir=llama, **flags).code == 0
    assert "1 of 1 rows are answered" in cli(SCRIPT, checkpoint_dir=link, seed=3, **flags).err
    cli(SCRIPT, checkpoint_dir=link, **flags | {"temperature": 1}).refused("other flags")


def test_two_at_once_do_not_mix(cli, llama, tmp_path):
    out = tmp_path / "a.jsonl"
    with open(out, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        prompts = write(tmp_path / "p.jsonl", [{"prompt": "a"}])
        cli(SCRIPT, checkpoint_dir=llama, prompt_file=prompts, out=out).refused(
            "a.jsonl: another process is writing it"
        )
    assert out.read_bytes() == b""


def told(folder: Path, path: Path | None) -> str:
    """The answer to "the cat" of a LoRA alone."""
    tokenizer = Tokenizer(folder)
    model, style = load_model(folder), PromptStyle.from_checkpoint(folder, tokenizer)
    if path:
        model, record = finetuned_model.load_finetuned(folder, path, lora.NAME)
        style = PromptStyle.from_dict(record["prompt_style"])
    ids = style.encode_prompt([{"role": "user", "content": "the cat"}], tokenizer)
    return tokenizer.decode(list(generate(model, ids, 30, temperature=0, stop_ids=style.stop_ids)))
