"""Reads what a finetune has left in its out_dir so far."""

import csv
import math
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lit_gpt.errors import UserError
from lit_gpt.files import read_json

# the columns of metrics.csv
COLUMNS = ("step", "tokens", "loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes", "score")
Row = dict[str, float]  # of metrics.csv, without the columns that are empty, and "seconds" of training so far


@dataclass(frozen=True)
class RunRecord:
    """Holds what an out_dir tells of its run.

    Attributes:
        series: the number of the run's color.
        summary: empty while the run has not ended.
    """

    name: str
    series: int
    rows: list[Row]
    hyperparameters: dict[str, Any]
    summary: dict[str, Any]
    status: str

    def points(self, x: str, y: str) -> list[tuple[float, float]]:
        """Return the values of two columns, where a row has both."""
        return [(row[x], row[y]) for row in self.rows if x in row and y in row]

    @property
    def best(self) -> tuple[float, float] | None:
        """Return the step and value of the lowest validation loss."""
        points = [p for p in self.points("step", "val_loss") if math.isfinite(p[1])]
        return min(points, key=lambda p: p[1], default=None)


def read_run(folder: Path, name: str, series: int) -> RunRecord:
    """Read the run of an out_dir.

    Raises:
        UserError: it is not the out_dir of a finetune, or one of its files is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected the out_dir of a finetune")
    for file in ("metrics.csv", "hyperparameters.json"):
        if not (folder / file).is_file():
            raise UserError(f"{folder}: not the out_dir of a finetune: {file} is missing")
    rows, hyperparameters = read_metrics(folder / "metrics.csv"), read_json(folder / "hyperparameters.json")
    summary = read_json(folder / "summary.json", missing_ok=True)
    if summary.get("steps", -1) < (rows[-1]["step"] if rows else 0):  # of an earlier end
        summary = {}
    status = "finished" if summary else unfinished(folder, rows, hyperparameters.get("max_steps"))
    return RunRecord(name, series, rows, hyperparameters, summary, status)


def read_metrics(path: Path) -> list[Row]:
    """Read a metrics.csv, whose last line may be half-written."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        header, *lines = list(csv.reader(file)) or [[]]
    if not {"step", "tokens", "loss"} <= set(header):
        raise UserError(f"{path}: expected the columns {', '.join(COLUMNS)} in the first line")
    rows: list[Row] = []
    seconds = tokens = 0.0
    for number, line in enumerate(lines, 2):
        try:
            row = {name: float(value) for name, value in zip(header, line, strict=True) if value}
            _ = row["step"], row["tokens"]  # which no row goes without
        except (ValueError, KeyError):
            if number == len(lines) + 1:  # it is being written
                break
            raise UserError(f"{path}: line {number}: expected {len(header)} numbers with commas between") from None
        if row.get("tokens_per_second"):
            seconds += (row["tokens"] - tokens) / row["tokens_per_second"]
            tokens = row["tokens"]
        rows.append(row | {"seconds": seconds})
    return rows


def unfinished(folder: Path, rows: list[Row], planned: int | None) -> str:
    """Return what has become of a run, as far as its files tell: one that no longer writes may be slow, or dead."""
    steps = int(rows[-1]["step"]) if rows else 0
    done = f"{steps:,} of {planned:,} steps" if planned else f"{steps:,} steps"
    for path in folder.glob("batch_of_step_*.pth"):
        step = path.stem.removeprefix("batch_of_step_")
        if step.isdecimal() and int(step) > steps:  # else the run has gone on since
            return f"failed after {done}: the loss was not a number, see {path.name}"
    silent = max(0.0, time.time() - (folder / "metrics.csv").stat().st_mtime)
    usual = max((b["seconds"] - a["seconds"] for a, b in pairwise(rows)), default=0.0)
    if silent < max(600.0, 10 * usual):
        return f"under way: {done}, the last {duration(silent)} ago"
    resumable = " (--resume auto goes on)" if any((folder / "state").glob("step_*.pth")) else ""
    return f"ended early: {done}, the last {duration(silent)} ago{resumable}"


def duration(seconds: float) -> str:
    """Return a time such as 3 min 20 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
