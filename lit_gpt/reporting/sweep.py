"""Runs a finetune script once for each of several settings, and compares what came out.

Every run has an out_dir of its own, in which nothing is different from a run by hand. A sweep that was stopped goes on:
runs that have ended are left alone, and those that have not are resumed. A run that outlives a killed sweep is waited
for.
"""

import csv
import hashlib
import itertools
import json
import math
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import yaml

from lit_gpt.errors import UserError
from lit_gpt.files import atomic, read_json, take_lock, write_json
from lit_gpt.reporting.report import write_page

FIELDS = ("script", "common", "grid", "settings")
FIGURES = ("val_loss_last", "val_loss_first", "trainable_parameters", "steps", "tokens", "seconds", "peak_memory_bytes")
LONGEST = 120  # of names, which have to fit into a file system
Flags = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run of a sweep.

    Attributes:
        own: the flags in which the runs differ; `flags` are all.
    """

    name: str
    own: Flags
    flags: Flags


@dataclass
class Sweep:
    """The runs of a sweep, in folders below `out_dir`.

    Attributes:
        failed: {name of a run: the last line that it wrote}.
    """

    script: Path
    runs: list[Run]
    out_dir: Path
    failed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, out_dir: Path) -> "Sweep":
        """Read a JSON or YAML file: the script, flags in common, a grid, and settings besides.

        {"script": "finetune/lora.py", "common": {flag: value}, "grid": {flag: [values]}, "settings": [{flag: value}]}

        Raises:
            UserError: it is no such file, or other runs lie in `out_dir`.
        """
        contents = read_fields(path)
        script, common = Path(str(contents.get("script"))), contents.get("common") or {}
        if not script.is_file():
            raise UserError(
                f"{path}: script: {script}: no such file; expected one of finetune/, such as finetune/lora.py"
            )
        grid, settings = contents.get("grid") or {}, contents.get("settings") or []
        if not all(isinstance(values, list) and values for values in grid.values()):
            raise UserError(f"{path}: grid: expected a list of values for each flag")
        if not isinstance(settings, list) or not all(isinstance(setting, dict) for setting in settings):
            raise UserError(f"{path}: settings: expected a list of objects of flags")
        product = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []
        runs = [Run(name_of(own), own, common | own) for own in [*product, *settings]]
        check_runs(runs, path)
        sweep = cls(script, runs, out_dir)
        sweep.record()
        return sweep

    def record(self) -> None:
        """Write which runs there are, and refuse a folder in which runs of the same name have other flags."""
        path, flags = self.out_dir / "sweep.json", {run.name: run.flags for run in self.runs}
        for name, before in read_json(path, missing_ok=True).items():
            if flags.setdefault(name, before) != before:
                differs = sorted(
                    flag for flag in before.keys() | flags[name] if before.get(flag) != flags[name].get(flag)
                )
                raise UserError(f"{path}: the run {name} had another {differs[0]}; choose another --out_dir")
        self.out_dir.mkdir(parents=True, exist_ok=True)
        write_json(path, flags)

    def run(self, parallel: int, only: int | None = None) -> None:
        """Take the runs that have not ended, so many at a time. What fails is noted, and the others go on.

        Args:
            only: take none but this one, counted from 0.
        """
        waiting = [run for run in self.runs if not self.summary(run)]
        done = len(self.runs) - len(waiting)
        if done:
            print(f"{done} of {len(self.runs)} runs have ended before")
        if only is not None:
            waiting = [run for run in waiting if run is self.runs[only]]
        with ThreadPoolExecutor(parallel) as pool, children() as start:
            tasks = {pool.submit(self.take, run, start): run for run in waiting}
            try:
                for task in as_completed(tasks):
                    done += 1
                    print(f"{done}/{len(self.runs)} {tasks[task].name}: {task.result()}", flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def take(self, run: Run, start: Any) -> str:
        """Carry a run to its end, and return what came out in words."""
        log = self.out_dir / f"{run.name}.log"
        flags = run.flags | {"out_dir": self.out_dir / run.name, "resume": "auto"}
        argv = [sys.executable, str(self.script), *(f"--{name}={plain(value)}" for name, value in flags.items())]
        code = start(argv, log, lambda: bool(self.summary(run)))
        if code == 0:
            return f"validation loss {self.summary(run).get('val_loss_last', math.nan):.4f}"
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [f"exit code {code}"]
        self.failed[run.name] = lines[-1].removeprefix("error: ")
        return f"failed: {self.failed[run.name]}"

    def summary(self, run: Run) -> dict[str, Any]:
        """Return the summary.json of a run that has ended, else an empty one."""
        return read_json(self.out_dir / run.name / "summary.json", missing_ok=True)

    def report(self) -> list[Run]:
        """Write sweep.csv and report.html, the runs in the order of their validation loss, and return these."""
        ended = [run for run in self.runs if self.summary(run)]
        ended.sort(key=lambda run: order(self.summary(run).get("val_loss_last")))
        flags = list(dict.fromkeys(name for run in self.runs for name in run.own))
        with (
            atomic(self.out_dir / "sweep.csv") as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(["run", *flags, *FIGURES])
            for run in ended:
                figures = self.summary(run)
                values = [plain(run.own[name]) if name in run.own else "" for name in flags]
                writer.writerow([run.name, *values, *(figures.get(name, "") for name in FIGURES)])
        if ended:
            write_page([self.out_dir / run.name for run in ended], self.out_dir / "report.html", flags)
        return ended


def read_fields(path: Path) -> dict[str, Any]:
    """Read the file of a sweep. Raises UserError if it is no object of its fields."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        contents = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"--sweep_path {path}: cannot be read as JSON or YAML ({' '.join(str(error).split())})"
        ) from None
    if not isinstance(contents, dict) or contents.keys() - set(FIELDS):
        found = ", ".join(sorted(contents.keys() - set(FIELDS))) if isinstance(contents, dict) else "no object"
        raise UserError(f"--sweep_path {path}: expected the fields {', '.join(FIELDS)}; found {found}")
    for name in ("common", "grid"):
        if not isinstance(contents.get(name) or {}, dict):
            raise UserError(f"--sweep_path {path}: {name}: expected an object of flags")
    return contents


def check_runs(runs: list[Run], path: Path) -> None:
    """Refuse settings that make no runs, or not runs of their own."""
    if not runs:
        raise UserError(f"{path}: makes no run; expected a grid or settings")
    for run in runs:
        if own := {"out_dir", "resume"} & run.flags.keys():
            raise UserError(f"{path}: {min(own)}: is each run's own, which the sweep gives; leave it out")
    names = [run.name for run in runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{path}: the run {twice} comes twice; leave one out")


def name_of(own: Flags) -> str:
    """Return the name of the run with these flags, which is fit to be a folder's."""
    whole = re.sub(r"[^\w.+-]+", "_", "-".join(f"{name}_{plain(value)}" for name, value in own.items())) or "common"
    return whole if len(whole) <= LONGEST else f"{whole[:LONGEST]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def plain(value: Any) -> str:
    """Return the value of a flag as the command line takes it."""
    return value if isinstance(value, str) else str(value) if isinstance(value, Path) else json.dumps(value)


def order(loss: float | None) -> float:
    """Return by what a run is put in order: those without a loss, or none that is a number, come last."""
    return math.inf if loss is None or math.isnan(loss) else loss


@contextmanager
def children() -> Iterator[Callable[[list[str], Path, Callable[[], bool]], int]]:
    """Give what runs a process with its output in a log, unless it has `ended` by then, and returns its exit code.

    What still runs at the end is told to stop, and waited for. A finetune that is told so saves its state first.
    """
    started: list[subprocess.Popen[bytes]] = []
    stopping = threading.Event()

    def start(argv: list[str], log: Path, ended: Callable[[], bool]) -> int:
        with open(log, "a", encoding="utf-8") as file:
            wait_for_lock(file, log, stopping)
            if ended() or stopping.is_set():
                return 0
            process = subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT)
        started.append(process)
        return process.wait()

    try:
        yield start
    finally:
        stopping.set()
        for process in started:
            if process.poll() is None:
                process.terminate()
        for process in started:
            process.wait()


def wait_for_lock(file: TextIO, log: Path, stopping: threading.Event) -> None:
    """Lock a log for the process that is to write it, which inherits the lock, once no other process does.

    A sweep that was killed leaves its run behind, which would write the same folder as the one that takes its place.
    """
    while not stopping.is_set():
        try:
            return take_lock(file.fileno(), log)
        except UserError:
            stopping.wait(1)
