"""Rows of every kind of file, mixed, deduplicated, damaged; and a preparation that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.cli import spawn
from helpers.paths import ROOT
from helpers.rows import ROWS, write_rows
from lit_gpt import Tokenizer
from lit_gpt.data import dataset
from lit_gpt.data import sources as rows
from lit_gpt.data.folder import SPLITS
from lit_gpt.data.sources import Source, parse_sources
from lit_gpt.errors import UserError

SCRIPT = "scripts/prepare_json.py"


def texts(folder: Path, llama: Path, split: str = "train") -> list[str]:
    tokenizer = Tokenizer(llama)
    return [tokenizer.decode(sample.tokens) for sample in dataset.Dataset(folder, split)]


def audit(folder: Path, split: str = "train") -> dict:
    return json.loads((folder / "data.json").read_text())["audit"][split]


@pytest.fixture
def flags(llama, tmp_path) -> dict:
    return {"checkpoint_dir": llama, "out_dir": tmp_path / "d", "prompt_style": "plain"}


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, monkeypatch, block):
    """Whatever the blocks in which a list is read."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(rows, "BLOCK", block)
    table = [row | {"output": f'{row["output"]}\n"[{{ü🙂 \\'} for row in ROWS]
    write_rows(tmp_path / "r.jsonl", table)
    listed = ",\n".join(json.dumps(row, indent=1) for row in table)
    (tmp_path / "r.json").write_text(f"\n [{listed} \n]\n ")
    parquet.write_table(pa.Table.from_pylist(table), tmp_path / "r.parquet", row_group_size=3)
    for name in ("r.json", "r.jsonl", "r.parquet"):
        assert [row.fields for row in Source(str(tmp_path / name)).rows()] == table


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"a": 1},\n{"a": 2},\n{"a": }]', "line 3: not JSON: Expecting value"),
        ('[{"a": 1}\n{"a": 2}]', "line 2: not JSON: Expecting ','"),
        ('[{"a": 1},\n{"a": 2}', "line 2: not JSON: Expecting ','"),
        ('[{"a": 1},\n{"a": "2', "line 2: not JSON: Unterminated string"),
        ("nothing", "line 1: not JSON: Expecting '\\['"),
        ('{"a": 1}', "expected a list"),
    ],
)
@pytest.mark.parametrize("block", [1, 9, 1 << 20])
def test_malformed_lists_name_the_line(tmp_path, monkeypatch, block, text, words):
    monkeypatch.setattr(rows, "BLOCK", block)
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=words):
        list(Source(str(tmp_path / "r.json")).rows())


def test_a_large_value_that_never_ends_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_ROW", 1000)
    monkeypatch.setattr(rows, "BLOCK", 100)
    (tmp_path / "r.json").write_text('[{"a": "' + "x" * 100_000 + '"}]')
    with pytest.raises(UserError, match="line 1"):
        list(Source(str(tmp_path / "r.json")).rows())


def test_sources_and_weights(tmp_path):
    assert parse_sources("a.jsonl, b.csv=0.5,o/n:train=2") == [
        Source("a.jsonl"), Source("b.csv", 0.5), Source("o/n:train", 2.0)
    ]  # fmt: skip
    odd = tmp_path / "a,b=2.jsonl"
    odd.touch()
    assert parse_sources(str(odd)) == [Source(str(odd))]
    for wrong in ("a.jsonl=0", "a.jsonl=-1", "a.jsonl=x", "a.jsonl=1000", "a.jsonl=nan"):
        with pytest.raises(UserError, match="WEIGHT"):
            parse_sources(wrong)
    for nothing in ("", ",", " , "):
        with pytest.raises(UserError, match="names no rows"):
            parse_sources(nothing)


def test_mixed_by_weight(cli, llama, flags, tmp_path):
    """Rows of weight 2.5 come two or three times, those of 0.5 once or not; none of them validates as well."""
    many = write_rows(tmp_path / "many.jsonl", [{"instruction": "a", "output": f"many {i}"} for i in range(20)])
    few = write_rows(tmp_path / "few.jsonl", [{"instruction": "a", "output": f"few {i}"} for i in range(20)])
    result = cli(SCRIPT, **flags, data_path=f"{many}=2.5,{few}=0.5", validation_fraction=0.2)
    assert result.code == 0, result.err
    train, validation = texts(tmp_path / "d", llama), texts(tmp_path / "d", llama, "validation")
    counts = [train.count(f"amany {i}") for i in range(20)]
    assert set(counts) <= {0, 2, 3} and {train.count(f"afew {i}") for i in range(20)} == {0, 1}
    assert len(validation) == len(set(validation)) == 6  # of the 30 rows that are taken
    assert not set(train) & set(validation)
    drawn = len({*train, *validation} - {f"amany {i}" for i in range(20)})
    assert drawn == 10 and counts.count(0) + sum(text.startswith("afew") for text in validation) == 6
    assert audit(tmp_path / "d")["rows_kept"] == len(train)
    cli(SCRIPT, **flags | {"out_dir": tmp_path / "e"}, data_path=f"{many}=2.5,{few}=0.5",
        validation_fraction=0.2)  # fmt: skip
    assert all(
        (tmp_path / "d" / n).read_bytes() == (tmp_path / "e" / n).read_bytes() for n in os.listdir(tmp_path / "d")
    )


def test_weights_that_take_nothing(cli, flags, tmp_path):
    path = write_rows(tmp_path / "r.jsonl")
    cli(SCRIPT, **flags, data_path=f"{path}=0.01").refused("r.jsonl=0.01", "take none of the rows")


def test_duplicates(cli, llama, flags, tmp_path):
    """Of rows that render alike the first stays, also between training and validation."""
    path = write_rows(tmp_path / "r.jsonl", [*ROWS, *ROWS[:7], {"instruction": "b", "output": "c"}])
    held = write_rows(tmp_path / "v.jsonl", [*ROWS[:3], {"instruction": "held", "output": "out"}])
    result = cli(SCRIPT, **flags, data_path=path, validation_path=held, deduplicate=True)
    assert result.code == 0 and "rows dropped: duplicate" in result.out
    expected = ["\n\n".join(filter(None, (r["instruction"], r["input"]))) + r["output"] for r in ROWS]
    assert texts(tmp_path / "d", llama) == [*expected, "bc"]
    assert texts(tmp_path / "d", llama, "validation") == ["heldout"]
    assert [audit(tmp_path / "d", split)["rows_dropped"]["duplicate"] for split in SPLITS] == [7, 3]


def test_bad_rows_are_counted_or_left_out(cli, llama, flags, tmp_path):
    path = write_rows(tmp_path / "r.jsonl")
    bad = ["{", '{"instruction": "a"}', "[]", '{"messages": "no"}', '{"messages": [{"role": "user", "content": 5}]}']
    path.write_bytes(path.read_bytes() + "\n".join(bad).encode() + b'\n{"instruction": "\xff"}\n')
    result = cli(SCRIPT, **flags, data_path=path)
    result.refused("r.jsonl: line 21: not JSON", "5 more rows cannot be used")
    assert not (tmp_path / "d").exists()
    result = cli(SCRIPT, **flags, data_path=path, skip_bad_rows=True)
    assert result.code == 0 and "6 rows cannot be used and are left out, the first: " in result.out
    assert sum(audit(tmp_path / "d", split)["rows_kept"] for split in SPLITS) == len(ROWS)


def test_rows_that_the_template_refuses(cli, llama, flags, tmp_path):
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{{ raise_exception('no system') if m.role == 'system' }}{{ m.content }}{{ eos_token }}"
        "{% endfor %}"
    )
    flags["prompt_style"] = tmp_path / "t.jinja"
    messages = [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    path = write_rows(tmp_path / "r.jsonl", [{"messages": messages[1:]}, {"messages": messages}] * 3)
    cli(SCRIPT, **flags, data_path=path).refused("r.jsonl: line 2: ", "no system")
    good = write_rows(tmp_path / "v.jsonl", [{"messages": messages[1:]}])
    assert cli(SCRIPT, **flags, data_path=path, validation_path=good, skip_bad_rows=True).code == 0
    assert audit(tmp_path / "d")["rows_dropped"] == {"refused by the template": 3}


def test_conversations_as_people_have_them(cli, llama, flags, tmp_path):
    """Named as ShareGPT does, spelled in JSON as in a table, with flags and tools."""
    flags["prompt_style"] = "chatml"
    plain = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    shared = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    several = [
        {"messages": plain},
        {"messages": shared},
        {"messages": json.dumps(plain)},
        {"messages": plain, "tools": "[]"},
    ]
    path = write_rows(tmp_path / "r.jsonl", several)
    assert cli(SCRIPT, **flags, data_path=path, validation_path=path).code == 0
    assert len(set(texts(tmp_path / "d", llama))) == 1
    for wrong, words in (
        ({"tool_calls": [{"function": {}}]}, "tool_calls"), ({"train": "no"}, "train"), ({"weight": 0.5}, "weight"),
        ({"content": [{"type": "text"}]}, '"content": text'), ({"content": None}, '"content": text'),
    ):  # fmt: skip
        path = write_rows(tmp_path / "w.jsonl", [{"messages": [plain[0], plain[1] | wrong]}])
        cli(SCRIPT, **flags | {"out_dir": tmp_path / "e"}, data_path=path).refused("line 1", words)
    path = write_rows(tmp_path / "w.jsonl", [{"messages": plain, "tools": {"a": 1}}])
    cli(SCRIPT, **flags | {"out_dir": tmp_path / "e"}, data_path=path).refused("line 1", "tools")


def test_answers_that_the_template_cuts_are_named(cli, flags, tmp_path):
    """A template that removes reasoning: nothing is learnt of such answers, and the refusal says why."""
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endfor %}"
    )
    reasoned = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>why</think>a"}]
    whole = [reasoned[0], {"role": "assistant", "content": "a"}]
    path = write_rows(tmp_path / "r.jsonl", [{"messages": reasoned}, {"messages": whole}])
    good = write_rows(tmp_path / "v.jsonl", [{"messages": whole}])
    flags |= {"prompt_style": tmp_path / "t.jinja", "data_path": path, "validation_path": good}
    cli(SCRIPT, **flags).refused("1 rows have no supervised token", "line 1", "t.jinja' does not show")
    assert cli(SCRIPT, **flags, allow_unsupervised=True).code == 0
    assert audit(tmp_path / "d")["answers_not_shown_in_full"] == 1 and audit(tmp_path / "d")["rows_kept"] == 1


def test_what_is_missing_is_said(cli, flags, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    cli(SCRIPT, **flags, data_path="owner/name").refused("pip install -e '.[datasets]'")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "r.parquet").touch()
    cli(SCRIPT, **flags, data_path=tmp_path / "r.parquet").refused("r.parquet", "pip install -e '.[parquet]'")
    monkeypatch.undo()
    pytest.importorskip("pyarrow")
    cli(SCRIPT, **flags, data_path=tmp_path / "r.parquet").refused("r.parquet", "Parquet")


def test_folders_that_datasets_has_saved(cli, flags, llama, tmp_path):
    datasets = pytest.importorskip("datasets", reason="an extra")
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "whole")
    datasets.DatasetDict(train=whole, test=whole.select(range(2))).save_to_disk(tmp_path / "splits")
    for name, expected in (("whole", ROWS), ("splits", ROWS), ("splits:test", ROWS[:2])):
        assert [row.fields for row in Source(str(tmp_path / name)).rows()] == expected
    for name, words in (("splits:dev", "dev"), ("d.txt", "expected a file that ends in")):
        cli(SCRIPT, **flags, data_path=tmp_path / name).refused(name, words)
    assert cli(SCRIPT, **flags, data_path=f"{tmp_path / 'splits'},{tmp_path / 'splits:test'}=2").code == 0
    assert len(texts(flags["out_dir"], llama)) > len(ROWS)


def test_rows_are_read_once(cli, llama, flags, tmp_path, monkeypatch):
    """Whatever splits, weights and duplicates need to know of all of them: a source may be a stream."""
    path, read = write_rows(tmp_path / "r.jsonl", [*ROWS, *ROWS[:3]]), []
    held = write_rows(tmp_path / "v.jsonl", ROWS[:1])
    rows_of = Source.rows
    monkeypatch.setattr(
        Source, "rows", lambda self: (read.append((self.name, row.where)) or row for row in rows_of(self))
    )
    for name, more in (("d", {}), ("e", {"validation_path": held}), ("f", {"deduplicate": True})):
        read.clear()
        cli(SCRIPT, **flags | {"out_dir": tmp_path / name, "data_path": f"{path}=1.5"} | more)
        assert len(read) == len(set(read)) == 23 + len(more.keys() & {"validation_path"})
        assert sorted(os.listdir(tmp_path / name)) == ["data.json", "train.safetensors", "validation.safetensors"]


def test_a_row_of_no_weight_is_not_refused_by_the_template(cli, llama, flags, tmp_path):
    """Rows that no split takes are rendered with the others, and what becomes of them is not counted."""
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{{ raise_exception('no') if m.content == 'x' }}{{ m.content + eos_token }}{% endfor %}"
    )
    flags["prompt_style"] = tmp_path / "t.jinja"
    bad = write_rows(tmp_path / "bad.jsonl", [{"instruction": "x", "output": "b"}] * 2)
    good = write_rows(tmp_path / "good.jsonl", ROWS)
    result = cli(SCRIPT, **flags, data_path=f"{good},{bad}=0.1")
    assert result.code == 0, result.err
    assert sum(audit(tmp_path / "d", split)["rows_kept"] for split in SPLITS) == len(ROWS)
    cli(SCRIPT, **flags | {"out_dir": tmp_path / "e"}, data_path=f"{good},{bad}=1").refused("bad.jsonl: line 1: ", "no")


@pytest.mark.subprocess
def test_killed_in_the_middle(llama, flags, tmp_path, cli):
    """SIGKILL: no folder. The same command then starts over and leaves nothing else; two at once are refused."""
    path = write_rows(
        tmp_path / "r.jsonl", [{"instruction": f"a {i}", "output": "the cat " * 30} for i in range(20_000)]
    )
    process = spawn(SCRIPT, **flags, data_path=path)
    half_made = tmp_path / ".d.tmp" / "rows.tokens"
    while not (half_made.exists() and half_made.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    cli(SCRIPT, **flags, data_path=write_rows(tmp_path / "few.jsonl")).refused("another process is writing it")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert half_made.exists() and not (tmp_path / "d").exists()
    assert cli(SCRIPT, **flags, data_path=tmp_path / "few.jsonl").code == 0
    assert sorted(os.listdir(tmp_path / "d")) == ["data.json", "train.safetensors", "validation.safetensors"]
    assert len(texts(tmp_path / "d", llama)) == 19 and not (tmp_path / ".d.tmp").exists()


@pytest.mark.subprocess
def test_memory_benchmark(tmp_path):
    argv = [sys.executable, ROOT / "benchmarks" / "prepare_memory.py", "--gigabytes=0.001", f"--work_dir={tmp_path}"]
    found = json.loads(subprocess.run(list(map(str, argv)), capture_output=True, check=True, text=True).stdout)
    assert found["rows"] > 100 and found["audit"]["train"]["rows_dropped"]["duplicate"] >= 1
    assert 10**8 < found["peak_resident_bytes"] < 1.5e9 and not list(tmp_path.iterdir())
