"""scripts/report.py: pages of runs that ended, go on and broke; and the picture that a run leaves."""

import csv
import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from helpers.paths import ROOT
from lit_gpt.reporting.charts import smooth, thin, ticks
from lit_gpt.reporting.runs import COLUMNS
from lit_gpt.training.records import plot

SCRIPT = "scripts/report.py"
EVIL = """<script>alert("1")</script>&'"""


def make_run(folder: Path, steps: int = 30, finished: bool = True, **hyperparameters) -> Path:
    """The records of a run whose loss is 4 / step and takes 50 tokens and a second for each."""
    folder.mkdir(parents=True)
    rows = [{"step": 0, "tokens": 0, "val_loss": 5.0}]
    for step in range(1, steps + 1):
        row = {"step": step, "tokens": 50 * step, "loss": 4 / step, "lr": 1e-3, "tokens_per_second": 50.0}
        rows.append(row | {"peak_memory_bytes": 10**9} | ({"val_loss": 6 / step} if step % 10 == 0 else {}))
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    values = {"learning_rate": 1e-3, "max_steps": 30, "seed": 1337, "out_dir": str(folder)} | hyperparameters
    (folder / "hyperparameters.json").write_text(json.dumps(values))
    if finished:
        summary = {"method": "lora", "trainable_parameters": 1234, "steps": steps, "probe_loss_first": 3.0}
        (folder / "summary.json").write_text(json.dumps(summary | {"probe_loss_last": 3.25}))
    return folder


class Page(HTMLParser):
    """The tags and texts of a page; every tag must be closed in its place."""

    VOID = {"meta"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and data.strip():
            self.texts.append(data.strip())

    def row(self, name: str) -> list[str]:
        """The cells of a table's row."""
        row = re.search(rf'<tr><th scope="row">{name}</th>(.*?)</tr>', self.source)[1]
        return [re.sub("<.*?>", "", cell) for cell in re.findall("<td[^>]*>(.*?)</td>", row)]


@pytest.fixture
def report(cli, tmp_path):
    """Run the script in this process; returns exit code, stderr and the page, if there is one."""

    def run(*arguments) -> tuple[int, str, Page | None]:
        path = tmp_path / "report.html"
        result = cli(SCRIPT, *arguments, out=path)
        assert "Traceback" not in result.err and result.err.count("error: ") == bool(result.code)
        return result.code, result.err, Page(path) if not result.code else None

    return run


def test_runs_side_by_side(report, tmp_path):
    a = make_run(tmp_path / "runs/a")
    b = make_run(tmp_path / "runs/b", steps=20, learning_rate=3e-3, note="x")
    code, _, page = report(a, b)
    assert code == 0
    assert page.row("status") == ["finished", "finished"]
    assert page.row("learning_rate") == ["0.001", "0.003"] and page.row("note") == ["", "x"]
    assert page.row("seed") == ["1337"] and "out_dir" not in page.texts
    assert page.row("steps") == ["30", "20"] and page.row("tokens") == ["1,500", "1,000"]
    assert page.row("training time") == ["30 s", "20 s"] and page.row("tokens per second") == ["50", "50"]
    assert page.row("validation loss at last") == ["0.2000", "0.3000"]
    assert '<span class="best">0.2000</span>' in page.source and '<span class="best">0.3' not in page.source
    assert page.row("lowest validation loss") == ["0.2000 at step 30", "0.3000 at step 20"]
    assert page.row("probe, after") == ["3.2500", "3.2500"] and page.row("peak memory") == ["1.00 GB"] * 2
    titles = ["Training loss", "Training loss over time", "Validation loss", "Learning rate", "Speed", "Peak memory"]
    assert [text for text in page.texts if text in titles] == titles
    assert sum(tag == "figure" for tag, _ in page.tags) == 6
    # the ends of the two validation curves, where they belong: equal heights are equal losses
    marks = [(attrs["class"], float(attrs["cx"]), float(attrs["cy"])) for tag, attrs in page.tags if tag == "circle"]
    of_a, of_b = ([mark for mark in marks if f"series-{i} " in mark[0]] for i in (0, 1))
    assert len(of_a) == 4 and len(of_b) == 3
    assert of_a[:3] == [(of_a[i][0], *of_b[i][1:]) for i in range(3)] and of_a[3][2] > of_a[2][2]
    told = [text for text in page.texts if text.startswith("a: ")]
    assert told[-1] == "a: 0.2 at 1.5k"


def test_the_page_stands_alone(report, tmp_path):
    """No script, and nothing that is fetched."""
    _, _, page = report(make_run(tmp_path / "a"), make_run(tmp_path / "b"))
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|url\(|@import|src=|href=", page.source)
    assert "All are the same." in page.texts and len(page.source) < 200_000
    assert {"viewport"} <= {attrs.get("name") for tag, attrs in page.tags if tag == "meta"}


def test_names_and_values_are_escaped(report, tmp_path):
    a = make_run(tmp_path / EVIL.replace("/", "|"), data_dir=EVIL, optimizer_args={EVIL: [EVIL]}, **{EVIL: 1})
    (a / "summary.json").write_text(json.dumps({"steps": 30, "method": EVIL}))
    code, _, page = report(a, make_run(tmp_path / "b"))
    assert code == 0 and not any(tag == "script" for tag, _ in page.tags)
    assert EVIL.replace("/", "|") in page.texts  # read back as they were
    assert page.texts.count(EVIL) == 3  # the method, and a hyperparameter's name and value


def test_runs_that_have_not_ended(report, tmp_path):
    """Under way, ended early, broken, resumed after an end, hardly begun; a row may be half-written."""
    going = make_run(tmp_path / "going", 12, finished=False)
    with open(going / "metrics.csv", "a") as file:
        file.write("13,650,0.3")
    dead = make_run(tmp_path / "dead", 12, finished=False, max_steps=None)
    (dead / "state").mkdir()
    (dead / "state" / "step_00000010.pth").touch()
    before = time.time() - 3 * 3600
    os.utime(dead / "metrics.csv", (before, before))
    broken = make_run(tmp_path / "broken", 7, finished=False)
    (broken / "batch_of_step_8.pth").touch()
    longer = make_run(tmp_path / "longer", 12)
    (longer / "batch_of_step_8.pth").touch()
    (longer / "summary.json").write_text('{"steps": 10}')
    empty = make_run(tmp_path / "empty", 0, finished=False)
    (empty / "metrics.csv").write_text(",".join(COLUMNS) + "\n")
    code, _, page = report(going, dead, broken, longer, empty)
    status = page.row("status")
    assert code == 0 and status[0].startswith("under way: 12 of 30 steps, the last ")
    assert status[1] == "ended early: 12 steps, the last 3 h 0 min ago (--resume auto goes on)"
    assert status[2] == "failed after 7 of 30 steps: the loss was not a number, see batch_of_step_8.pth"
    assert status[3].startswith("under way") and status[4].startswith("under way: 0 of 30 steps")
    assert page.row("steps") == ["12", "12", "7", "12", ""]


def test_only_a_run_without_rows(report, tmp_path):
    run = make_run(tmp_path / "a", 0, finished=False)
    (run / "metrics.csv").write_text(",".join(COLUMNS) + "\n")
    _, _, page = report(run)
    assert "No run has written a row yet." in page.texts


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda run: run.rename(run.with_name("x")), ["a: no such folder"]),
        (lambda run: (run / "metrics.csv").unlink(), ["not the out_dir", "metrics.csv is missing"]),
        (lambda run: (run / "hyperparameters.json").unlink(), ["not the out_dir", "hyperparameters.json"]),
        (lambda run: (run / "hyperparameters.json").write_text("{"), ["hyperparameters.json: expected JSON"]),
        (lambda run: (run / "metrics.csv").write_text("a,b\n1,2\n"), ["metrics.csv: expected the columns step"]),
        (lambda run: (run / "metrics.csv").write_text("step,tokens,loss\n1,x,3\n2,3,4\n"), ["metrics.csv: line 2"]),
        (lambda run: (run.parent / "report.html").write_text("my thesis"), ["--out", "something else"]),
    ],
)
def test_refusals(report, tmp_path, spoil, words):
    run = make_run(tmp_path / "a")
    spoil(run)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    code, err, _ = report(run)
    assert code == 1 and all(word in err for word in words), err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before


def test_what_is_not_a_folder(report, tmp_path):
    run = make_run(tmp_path / "a")
    code, err, _ = report()
    assert code == 2 and "expected the out_dir of a run" in err
    assert report(run, f"{run}/")[0] == 2
    code, err, _ = report(run, "--outs", "x")
    assert code == 2 and "unknown flag --outs; did you mean --out?" in err


@pytest.mark.subprocess
def test_it_needs_no_torch(tmp_path):
    """So that it answers at once: neither to refuse nor to write a page."""
    run, page = make_run(tmp_path / "a"), tmp_path / "report.html"
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{SCRIPT!r}, *sys.argv[1:]]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print({'torch', 'lightning', 'numpy', 'matplotlib'} & sys.modules.keys())\n"
    )
    for arguments, expected in (((), 2), ((run, "--out", page), 0)):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == expected and process.stdout.endswith("set()\n"), process
    assert page.exists()


def test_the_former_spelling_of_its_flag_is_taken(cli, tmp_path):
    run, page = make_run(tmp_path / "a"), tmp_path / "page.html"
    assert cli(SCRIPT, run, report_path=page).code == 0 and page.exists()
    assert "--report_path" not in cli(SCRIPT, "--help").out


def test_an_older_report_is_replaced(report, tmp_path):
    run = make_run(tmp_path / "a")
    assert report(run)[0] == report(run)[0] == 0


def test_lines_of_many_points():
    points = [(float(i), 3.0) for i in range(1000)]
    assert len(thin(points)) <= 250 and {y for _, y in thin(points)} == {3.0}
    assert thin([(1.0, float("nan")), (2.0, 1.0)]) == [(2.0, 1.0)]
    noisy = [(float(i), i + (-1) ** i * 5.0) for i in range(400)]
    off = [abs(y - x) for x, y in smooth(noisy)]
    assert [x for x, _ in smooth(noisy)] == [x for x, _ in noisy] and max(off[10:-10]) < 1
    assert smooth([(0.0, 1.0), (1.0, 5.0)]) == [(0.0, 1.0), (1.0, 5.0)]


@pytest.mark.parametrize("low, high", [(0, 1), (0.4, 0.95), (3, 3), (0, 0), (1e-5, 9e-5), (-3, 12345)])
def test_ticks_hold_the_range(low, high):
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 3 <= len(found) <= 8
    assert found == pytest.approx([found[0] + i * (found[1] - found[0]) for i in range(len(found))])


def test_the_picture_of_a_run(tmp_path):
    """Of one row and of many; the curves are in it."""
    from matplotlib.image import imread

    for steps in (1, 200):
        rows = list(csv.DictReader(open(make_run(tmp_path / str(steps), steps) / "metrics.csv")))
        plot(rows, tmp_path / "loss.png")
        image = imread(tmp_path / "loss.png")
        blue = (image[..., 2] > 0.6) & (image[..., 0] < 0.4)
        red = (image[..., 0] > 0.7) & (image[..., 2] < 0.4)
        assert image.shape[1] > 1000 and red.sum() > 200 and (blue.sum() > 200 or steps == 1)
