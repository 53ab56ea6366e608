"""The quickstart's bundled data, and its parts that need no model. `make quickstart` itself takes minutes."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from helpers.paths import ROOT
from lit_gpt.errors import UserError


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_bookings, quickstart = load("data/make_bookings.py"), load("scripts/quickstart.py")


def rows(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ROOT / f"data/bookings_{split}.jsonl").read_text("utf-8").splitlines()]


TRAIN, TEST = rows("train"), rows("test")


def names(split: list[dict[str, str]]) -> set[str]:
    return {json.loads(row["output"])["name"] for row in split}


def skeleton(row: dict[str, str]) -> str:
    """The message without its facts: the sentence that it was made from, in lower case."""
    record, message = json.loads(row["output"]), row["input"]
    number = make_bookings.NUMBERS[record["people"] - 1]
    for fact in (record["name"], record["day"], *spoken_times(record["time"]), str(record["people"]), number):
        message = re.sub(rf"\b{re.escape(fact)}\b", "_", message, flags=re.IGNORECASE)
    return message.lower()


def spoken_times(time: str) -> list[str]:
    """All ways to say a time, written out independently of the generator; the longest first."""
    hour, minute = (int(part) for part in time.split(":"))
    words = "twelve one two three four five six seven eight nine ten eleven".split()
    ways = [f"{hour}:{minute:02} pm", f"{hour}:{minute:02}"]
    ways += {
        0: [f"{words[hour]} o'clock", f"{hour} o'clock", f"{hour} pm"],
        15: [f"quarter past {words[hour]}", f"{words[hour]} fifteen"],
        30: [f"half past {words[hour]}", f"half past {hour}", f"{words[hour]} thirty"],
        45: [f"quarter to {words[hour + 1]}", f"quarter to {hour + 1}"],
    }[minute]
    return ways


@pytest.mark.subprocess
def test_generator_reproduces_bundled_files(tmp_path):
    command = [sys.executable, ROOT / "data/make_bookings.py", "--out_dir", tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    for name in ("bookings_train.jsonl", "bookings_test.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / name).read_bytes()


def test_test_rows_share_nothing_with_training():
    messages = [row["input"] for row in TRAIN + TEST]
    assert len(set(messages)) == len(messages)
    assert not names(TRAIN) & names(TEST)
    assert not {skeleton(row) for row in TRAIN} & {skeleton(row) for row in TEST}
    # and no test name slips into a training message in another role
    assert not any(re.search(rf"\b{name}\b", row["input"]) for name in names(TEST) for row in TRAIN)


@pytest.mark.parametrize("split", [TRAIN, TEST], ids=["train", "test"])
def test_answers_hold_the_facts_of_their_messages(split):
    for row in split:
        record, message = json.loads(row["output"]), row["input"].lower()
        assert row["output"] == json.dumps(record)
        assert list(record) == ["name", "people", "day", "time"]
        assert re.search(rf"\b{record['name']}\b", row["input"])
        assert [day for day in make_bookings.DAYS if day in row["input"]] == [record["day"]]
        said = next(way for way in spoken_times(record["time"]) if re.search(rf"\b{way}\b", message))
        rest = message.replace(said, "")
        counts = [n for n, word in enumerate(make_bookings.NUMBERS, 1) if re.search(rf"\b({n}|{word})\b", rest)]
        assert counts == [record["people"]], row
        assert row["instruction"] == make_bookings.INSTRUCTION


def test_exact_match():
    answer = '{"name": "Ana", "people": 2, "day": "Sunday", "time": "8:30"}'
    assert quickstart.exact_match(f" {answer}\n", answer)
    assert not quickstart.exact_match(answer.replace("2", "3"), answer)
    assert not quickstart.exact_match(answer + answer, answer)
    assert not quickstart.exact_match("", answer)


def test_compare_counts_each_side():
    result = quickstart.compare([{"output": "a"}, {"output": "b"}], ["x", "y"], ["a", "y"])
    assert result["exact_match"] == {"before": 0.0, "after": 50.0}
    assert result["rows"][0] == {"output": "a", "before": "x", "after": "a"}


def test_screen_fits_80_columns(capsys):
    result = quickstart.compare(TEST, ['{\n  "name": "' + "so " * 50] * len(TEST), [row["output"] for row in TEST])
    quickstart.show(result | {"training": {"tokens": 40000, "seconds": 150.4}})
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) < 80
    assert out.count("before {") == 3
    assert all(f"after  {row['output']}" in out for row in TEST[:3])
    assert "after  100.0 %" in out


def test_screen_shows_what_was_wanted_where_the_answer_is_wrong(capsys):
    result = quickstart.compare(TEST, ["?"] * len(TEST), ["{}", *(row["output"] for row in TEST[1:])])
    quickstart.show(result | {"training": {"tokens": 1, "seconds": 1}})
    assert capsys.readouterr().out.count("wanted") == 1


@pytest.mark.subprocess
def test_command_is_printed_so_that_a_shell_runs_it(capfd, tmp_path):
    (tmp_path / "show.py").write_text("import sys\nprint(sys.argv[1:])\n")
    flags = {"prompt": 'say "it\'s" ' + "long " * 30, "number": 1e-3}
    argv, line = quickstart.spell(tmp_path / "show.py", **flags)
    assert argv[2:] == ["--prompt", flags["prompt"], "--number", "0.001"]
    shell = sys.executable + line[line.index(" ") :]  # whatever Python was printed, run this one
    assert subprocess.run(shell, shell=True, capture_output=True, text=True).stdout == f"{argv[2:]}\n"
    quickstart.command(tmp_path / "show.py", **flags)
    assert f"$ {line}\n" in capfd.readouterr().out


def test_failing_command_ends_with_its_exit_code(tmp_path):
    (tmp_path / "fail.py").write_text("import sys\nsys.exit(7)\n")
    with pytest.raises(SystemExit) as exit_:
        quickstart.command(tmp_path / "fail.py")
    assert exit_.value.code == 7


def test_saved_answers_are_used_for_the_same_messages_only(tmp_path):
    path = tmp_path / "after.json"
    path.write_text(json.dumps({"m": "a"}))
    assert quickstart.answers([{"input": "m"}], path, tmp_path) == ["a"]
    with pytest.raises(UserError):  # others are computed, for which there is no checkpoint here
        quickstart.answers([{"input": "n"}], path, tmp_path / "none")


def test_outside_the_repository_it_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="repository"):
        quickstart.main()


@pytest.mark.subprocess
def test_help():
    command = [sys.executable, ROOT / "scripts/quickstart.py", "--help"]
    assert "--out_dir" in subprocess.run(command, check=True, capture_output=True, text=True).stdout
