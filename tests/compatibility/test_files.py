"""Files that commit 2d5ab8b wrote work unchanged, and give the answers that they gave then."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from compatibility.make_files import ASKED, EXACT, FILES, MERGE, METHODS, SCORED, SHORT, STOPPED, TRAIN

ANSWERS = json.loads((FILES / "answers.json").read_text("utf-8"))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the files to a folder of their own, and go there."""
    shutil.copytree(FILES, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    return tmp_path / "files"


@pytest.mark.parametrize("name", ASKED)
def test_what_was_generated_is_generated(name, cli):
    if name == "merged":
        assert cli("scripts/merge_lora.py", *MERGE).code == 0
    result = cli(*ASKED[name])
    assert result.code == 0, result.err
    assert result.out == ANSWERS["text"][name]


@pytest.mark.parametrize("name", SCORED)
def test_what_was_scored_is_scored(name, cli):
    """The loss on the prepared data tells more finely than greedy text whether all weights are the same."""
    if name == "merged":
        assert cli("scripts/merge_lora.py", *MERGE).code == 0
    result = cli("eval/perplexity.py", *SCORED[name], "--data_dir", "data", "--json", "true")
    assert result.code == 0, result.err
    assert json.loads(result.out) == pytest.approx(ANSWERS["score"][name], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_prepared_data_trains_as_it_did(method, cli):
    result = cli(f"finetune/{method}.py", *TRAIN, *SHORT, *METHODS[method], "--out_dir", "out", *EXACT.get(method, []))
    assert result.code == 0, result.err
    with open("out/metrics.csv", newline="") as file:
        seen = [float(row[column] or 0) for row in csv.DictReader(file) for column in ("loss", "val_loss")]
    wanted = [float(value or 0) for row in ANSWERS["training"][method] for value in row]
    assert seen == pytest.approx(wanted, rel=1e-4)


def test_a_resume_state_of_before_is_refused_in_one_line(cli, place):
    (state,) = (place / "stopped/state").iterdir()
    before = state.read_bytes()
    result = cli("finetune/lora.py", *STOPPED, "--resume", "auto")
    result.refused(f"stopped/state/{state.name}", "earlier release")
    assert state.read_bytes() == before
