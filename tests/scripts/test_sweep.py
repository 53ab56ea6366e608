"""A sweep: each setting is an ordinary run, a stopped sweep goes on, and the results are put in order."""

import csv
import json
import os
import signal
import time

import pytest

from helpers.cli import spawn
from helpers.paths import ROOT
from helpers.runs import final, metrics, wait_for_step
from lit_gpt.reporting.sweep import Sweep

SCRIPT = "scripts/sweep.py"


def write(path, flags, **fields):
    common = {name: value if isinstance(value, int | float) else str(value) for name, value in flags.items()}
    del common["out_dir"]
    path.write_text(json.dumps({"script": str(ROOT / "finetune/lora.py"), "common": common} | fields))
    return path


@pytest.mark.slow
@pytest.mark.subprocess
def test_a_stopped_sweep_goes_on_and_ends_in_order(cli, flags, tmp_path):
    """It ends with what each run gives by itself; a setting that fails does not keep the others from running."""
    flags |= {"max_steps": 6, "eval_interval": 6, "sample_tokens": 0}
    settings = [{"lora_update": "vera", "lora_train": "B"}]
    path = write(tmp_path / "s.json", flags, grid={"learning_rate": [0.0001, 0.02]}, settings=settings)
    sweep = {"sweep_path": path, "out_dir": tmp_path / "sweep"}
    process = spawn(SCRIPT, **sweep)
    first = tmp_path / "sweep" / "learning_rate_0.0001"
    deadline = time.monotonic() + 100
    while not (first / "metrics.csv").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and not (tmp_path / "sweep" / "learning_rate_0.02").exists()
    out, err = (process := spawn(SCRIPT, **sweep)).communicate(timeout=240)
    assert process.returncode == 1 and err.count("error: ") == 1 and "1 of 3 runs failed" in err, err
    assert "--lora_update vera with --lora_train B" in err and "3/3" in out
    rows = list(csv.DictReader(open(tmp_path / "sweep" / "sweep.csv", newline="")))
    assert [row["run"] for row in rows] == ["learning_rate_0.02", "learning_rate_0.0001"]
    assert float(rows[0]["val_loss_last"]) < float(rows[1]["val_loss_last"])
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert page.index("<td>0.02</td>") < page.index("<td>0.0001</td>")
    for title in ("Lowest validation loss by learning_rate", "Training time by learning_rate"):
        assert title in page and title.replace("learning_rate", "lora_update") not in page  # of one value alone
    alone = flags | {"learning_rate": 0.0001}
    assert cli("finetune/lora.py", **alone).code == 0
    assert metrics(first) == metrics(flags["out_dir"]) and final(first).keys() == final(flags["out_dir"]).keys()


def wait_until_written(file, process):
    """Wait until a process has written a file anew, for a minute at most."""
    before, deadline = file.stat().st_mtime_ns, time.monotonic() + 60
    while file.stat().st_mtime_ns == before:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.subprocess
@pytest.mark.parametrize("outlives", [True, False])
def test_a_sweep_that_is_killed_goes_on(flags, tmp_path, outlives):
    """What has ended is left alone; the run it was in goes on once, whether that outlived the sweep or not."""
    flags |= {"max_steps": 60, "eval_interval": 60, "sample_tokens": 0}
    path = write(tmp_path / "s.json", flags, grid={"learning_rate": [0.0001, 0.001]})
    sweep = {"sweep_path": path, "out_dir": tmp_path / "sweep"}
    first, second = (tmp_path / "sweep" / f"learning_rate_{rate}" for rate in (0.0001, 0.001))
    process = spawn(SCRIPT, start_new_session=True, **sweep)
    wait_for_step(process, second, 3)
    if outlives:  # and has not ended when the sweep begins again
        process.kill()
        os.killpg(process.pid, signal.SIGSTOP)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = {file: file.stat().st_mtime_ns for file in [tmp_path / "sweep" / "sweep.json", *first.iterdir()]}
    again = spawn(SCRIPT, **sweep)
    if outlives:
        try:
            wait_until_written(tmp_path / "sweep" / "sweep.json", again)
        finally:
            os.killpg(process.pid, signal.SIGCONT)
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0 and "1 of 2 runs have ended before" in out, err
    assert ("resumed after step" in (tmp_path / "sweep" / f"{second.name}.log").read_text()) != outlives
    assert {file for file, time in before.items() if file.stat().st_mtime_ns != time} == {tmp_path / "sweep/sweep.json"}
    assert [row["step"] for row in metrics(second)] == [str(step) for step in range(61)]
    rows = list(csv.DictReader(open(tmp_path / "sweep" / "sweep.csv", newline="")))
    assert {row["run"] for row in rows} == {first.name, second.name}
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert page.count("<td>0.001</td>") == page.count("<td>0.0001</td>") == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, ["makes no run", "grid or settings"]),
        ({"grid": {"lora_r": 8}}, ["grid", "list of values"]),
        ({"grid": {"lora_r": [8, 8]}}, ["lora_r_8", "comes twice"]),
        ({"settings": [{"out_dir": "x"}]}, ["out_dir", "leave it out"]),
        ({"sets": []}, ["expected the fields", "found sets"]),
        ({"script": "finetune/loar.py", "grid": {"lora_r": [8]}}, ["finetune/loar.py", "no such file"]),
    ],
    ids=str,
)
def test_what_is_no_sweep_is_refused_in_one_line(cli, flags, tmp_path, fields, words):
    path = write(tmp_path / "s.json", flags, **fields)
    cli(SCRIPT, sweep_path=path, out_dir=tmp_path / "sweep").refused("s.json", *words)
    assert not (tmp_path / "sweep").exists()


def test_other_runs_in_the_folder_are_not_mixed_with_these(cli, flags, tmp_path):
    grid = {"lora_r": [4, 8]}
    Sweep.read(write(tmp_path / "s.json", flags, grid=grid), tmp_path / "sweep")
    path = write(tmp_path / "s.json", flags | {"max_steps": 3}, grid=grid)
    cli(SCRIPT, sweep_path=path, out_dir=tmp_path / "sweep").refused("sweep.json", "lora_r_4", "another max_steps")


@pytest.mark.slow  # tests/scripts/test_tutorials.py runs a sweep too
@pytest.mark.subprocess
def test_an_array_of_jobs_takes_a_run_each(cli, flags, tmp_path):
    """And the page draws loss and time over words as over numbers."""
    flags |= {"max_steps": 2, "warmup_steps": 0, "eval_interval": 2, "sample_tokens": 0}
    path = write(tmp_path / "s.json", flags, grid={"lora_update": ["plain", "dora"]})
    sweep = {"sweep_path": path, "out_dir": tmp_path / "sweep"}
    for index in (0, 1):
        assert (result := cli(SCRIPT, **sweep, only=index)).code == 0, result.err
        assert (tmp_path / "sweep/lora_update_dora").exists() == (index == 1)
    page = (tmp_path / "sweep" / "report.html").read_text()
    figure = page[page.index("<figure><figcaption>Training time by lora_update") :].partition("</figure>")[0]
    assert all(f">{word}</text>" in figure for word in ("plain", "dora"))
    cli(SCRIPT, **sweep, only=2).refused("--only 2", "makes 2 runs", code=2)
