"""Runs side by side, as one HTML page that needs neither network nor script and can be printed."""

import csv
import json
import math
import time
from dataclasses import dataclass
from html import escape
from os.path import commonpath
from pathlib import Path
from typing import Any

from lit_gpt.errors import UsageError, UserError
from lit_gpt.files import atomic
from lit_gpt.reporting.charts import Line, chart, smooth
from lit_gpt.reporting.metrics import COLUMNS

GENERATOR = '<meta name="generator" content="Lit-GPT report">'
NOT_COMPARED = {"out_dir", "resume", "logger"}
COLOURS = 8  # series of the style sheet; further runs begin anew
STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --dim: #57606a; --rule: #d0d7de; --box: #f6f8fa;
  --series-0: #0969b4; --series-1: #c2410c; --series-2: #15803d; --series-3: #9333a8; --series-4: #92700c;
  --series-5: #be185d; --series-6: #0e7490; --series-7: #4b5563; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #0d1117; --ink: #e6edf3; --dim: #9aa5b1;
  --rule: #30363d; --box: #161b22; --series-0: #58a6ff; --series-1: #fb8f44; --series-2: #4ac26b; --series-3: #d2a8ff;
  --series-4: #e3b341; --series-5: #ff7eb6; --series-6: #39c5cf; --series-7: #b1bac4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1160px; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 28px 0 8px; }
p { margin: 4px 0 12px; color: var(--dim); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 16px; }
figure { margin: 0; padding: 12px; border: 1px solid var(--rule); border-radius: 8px; break-inside: avoid; }
figcaption { font-weight: 600; } figcaption small { font-weight: 400; color: var(--dim); }
svg { display: block; width: 100%; height: auto; overflow: hidden; } figure > svg { overflow: visible; }
svg text { font: 12px system-ui, sans-serif; fill: var(--dim); }
.grid { stroke: var(--rule); stroke-width: 1; }
polyline { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
polyline.faint { stroke-width: 1; opacity: .3; } polyline.marked { stroke-dasharray: 5 4; stroke-width: 1.5; }
circle { fill: var(--page); stroke: var(--c); stroke-width: 2; }
ul.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; list-style: none; margin: 4px 0; padding: 0; }
.legend li, th.run { overflow-wrap: anywhere; } th.run { min-width: 6.5em; }
.swatch { display: inline-block; width: 14px; height: 4px; margin: 0 6px 3px 0; border-radius: 2px;
  background: var(--c); print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
tr:last-child > * { border-bottom: 0; }
th[scope=row] { font-weight: 400; color: var(--dim); position: sticky; left: 0; background: var(--page);
  min-width: 100px; max-width: 190px; }
td { min-width: 112px; overflow-wrap: break-word; } thead th { background: var(--box); } .best { font-weight: 700; }
@media (max-width: 700px) { svg text { font-size: 14px; } .legend, table { font-size: 14px; }
  td { min-width: 98px; } th, td { padding: 5px 8px; } th[scope=row] { max-width: 110px; } }
details { margin-top: 12px; } summary { cursor: pointer; }
@page { margin: 12mm; }
@media print { :root { color-scheme: light; } body { padding: 0; max-width: none; font-size: 10pt; }
  h2 { margin-top: 16px; break-after: avoid; } tr { break-inside: avoid; } .scroll { overflow: visible; }
  .charts { grid-template-columns: 1fr 1fr; gap: 8px; } figure { padding: 8px; } .legend { font-size: 9pt; }
  th, td { padding: 3px 6px; } td { min-width: 0; } th[scope=row] { position: static; min-width: 0; } }
"""


@dataclass
class RunRecord:
    """What an out_dir tells of its run.

    Args:
        rows: of metrics.csv: None where a column is empty, and "seconds" of training so far added.
        summary: empty while the run has not ended.
    """

    name: str
    series: int
    rows: list[dict[str, float | None]]
    hyperparameters: dict[str, Any]
    summary: dict[str, Any]
    status: str

    def points(self, x: str, y: str) -> list[tuple[float, float]]:
        return [(row[x], row[y]) for row in self.rows if row[x] is not None and row[y] is not None]

    @property
    def best(self) -> tuple[float, float] | None:
        """Step and value of the lowest validation loss."""
        points = [p for p in self.points("step", "val_loss") if math.isfinite(p[1])]
        return min(points, key=lambda p: p[1], default=None)


def report(out_dirs: list[Path], report_path: Path) -> None:
    """Write the page on the runs in `out_dirs` to `report_path`.

    Raises:
        UserError: a folder is no run, or `report_path` holds something else than a report.
    """
    if not out_dirs:
        raise UsageError("expected the out_dir of a run, or of several: python scripts/report.py out/lora/a out/lora/b")
    folders = [folder.resolve() for folder in out_dirs]
    if len(set(folders)) < len(folders):
        raise UsageError("OUT_DIR: a folder is named twice")
    if report_path.exists() and GENERATOR not in report_path.read_text(encoding="utf-8", errors="replace")[:500]:
        raise UserError(f"--report_path {report_path}: holds something else than a report; choose another")
    common = Path(commonpath([folder.parent for folder in folders]))
    names = [str(folder.relative_to(common)) for folder in folders]
    runs = [read_run(f, name, i % COLOURS) for i, (f, name) in enumerate(zip(out_dirs, names, strict=True))]
    with atomic(report_path) as temporary:
        temporary.write_text(page(runs), encoding="utf-8")
    for run in runs:
        print(f"{run.name}: {run.status}")
    print(f"wrote {report_path}")


def read_run(folder: Path, name: str, series: int) -> RunRecord:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected the out_dir of a finetune")
    for file in ("metrics.csv", "hyperparameters.json"):
        if not (folder / file).is_file():
            raise UserError(f"{folder}: not the out_dir of a finetune: {file} is missing")
    rows, hyperparameters = read_metrics(folder / "metrics.csv"), read_object(folder / "hyperparameters.json")
    summary = read_object(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    steps = rows[-1]["step"] if rows else 0
    if summary.get("steps", -1) < steps:  # of an earlier end
        summary = {}
    return RunRecord(name, series, rows, hyperparameters, summary, status(folder, rows, hyperparameters, summary))


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        lines = list(csv.reader(file))
    if not lines or not {"step", "tokens", "loss"} <= set(lines[0]):
        raise UserError(f"{path}: expected the columns {', '.join(COLUMNS)} in the first line")
    rows: list[dict[str, float | None]] = []
    seconds, tokens = 0.0, 0.0
    for number, line in enumerate(lines[1:], 2):
        try:
            row = dict.fromkeys(COLUMNS) | {k: float(v) if v else None for k, v in zip(lines[0], line, strict=True)}
        except ValueError:
            if number == len(lines):  # it is being written
                break
            raise UserError(f"{path}: line {number}: expected {len(lines[0])} numbers with commas between") from None
        if row["tokens_per_second"]:
            seconds += ((row["tokens"] or 0) - tokens) / row["tokens_per_second"]
            tokens = row["tokens"] or 0
        rows.append(row | {"seconds": seconds})
    return rows


def read_object(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: expected a JSON object ({error})") from None


def status(folder: Path, rows: list[dict], hyperparameters: dict[str, Any], summary: dict[str, Any]) -> str:
    """Whether the run has ended, as far as its files tell: one that no longer writes may be slow, or dead."""
    if summary:
        return "finished"
    steps, planned = int(rows[-1]["step"]) if rows else 0, hyperparameters.get("max_steps")
    done = f"{steps:,} of {planned:,} steps" if planned else f"{steps:,} steps"
    for path in folder.glob("batch_of_step_*.pth"):
        step = path.stem.removeprefix("batch_of_step_")
        if step.isdecimal() and int(step) > steps:  # else the run has gone on since
            return f"failed after {done}: the loss was not a number, see {path.name}"
    silent = max(0.0, time.time() - (folder / "metrics.csv").stat().st_mtime)
    times = [row["seconds"] for row in rows]
    usual = max((b - a for a, b in zip(times, times[1:], strict=False)), default=0.0)
    if silent < max(600.0, 10 * usual):
        return f"under way: {done}, the last {duration(silent)} ago"
    resumable = " (--resume auto goes on)" if any((folder / "state").glob("step_*.pth")) else ""
    return f"ended early: {done}, the last {duration(silent)} ago{resumable}"


def page(runs: list[RunRecord]) -> str:
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    differing, shared = compare(runs)
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    hyperparameters = table("Hyperparameters that differ", differing, runs) if differing else ""
    if len(runs) > 1 and not differing:
        hyperparameters = "<h2>Hyperparameters</h2><p>All are the same.</p>"
    same = table("", shared, runs[:1], header=False)
    heading = "All hyperparameters" if len(runs) == 1 else "Hyperparameters that all runs share"
    body = [
        f"<h1>{escape(title)}</h1><p>Made {made} by scripts/report.py.</p>",
        table("Results", results(runs), runs),
        f'<h2>Curves</h2><div class="charts">{"".join(figures(runs))}</div>',
        hyperparameters,
        f"<details{' open' if len(runs) == 1 else ''}><summary>{heading}</summary>{same}</details>" if shared else "",
    ]
    colours = "".join(f".series-{i} {{ --c: var(--series-{i}); }}\n" for i in range(COLOURS))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{GENERATOR}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{colours}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def figures(runs: list[RunRecord]) -> list[str]:
    """Each curve of all runs that have it."""

    def smoothed(x: str, y: str, scale: float = 1.0) -> list[Line]:
        lines = []
        for run in runs:
            raw = [(at / scale, value) for at, value in run.points(x, y)]
            lines += [Line(raw, run.series, faint=True), Line(smooth(raw), run.series, run.name)]
        return lines

    def plain(y: str, scale: float = 1.0, marked: bool = False) -> list[Line]:
        scaled = [[(x, value / scale) for x, value in run.points("tokens", y)] for run in runs]
        return [Line(points, run.series, run.name, marked) for points, run in zip(scaled, runs, strict=True)]

    whole = max((row["seconds"] for run in runs for row in run.rows), default=0.0)
    unit, size = next(u for u in (("h", 3600), ("min", 60), ("s", 1)) if whole >= 2 * u[1] or u[1] == 1)
    clock = f"{unit} of training, without validation"
    nats = "nats per supervised token"
    drawn = [
        ("Training loss", f"{nats}; smoothed", smoothed("tokens", "loss"), "tokens", short, number),
        ("Training loss over time", f"{nats}; smoothed", smoothed("seconds", "loss", size), clock, number, number),
        ("Validation loss", nats, plain("val_loss", marked=True), "tokens", short, number),
        ("Learning rate", "", plain("lr"), "tokens", short, number),
        ("Speed", "tokens per second; smoothed", smoothed("tokens", "tokens_per_second"), "tokens", short, short),
        ("Peak memory", "GB", plain("peak_memory_bytes", 1e9), "tokens", short, number),
    ]
    legend = "".join(f'<li><span class="swatch series-{run.series}"></span>{escape(run.name)}</li>' for run in runs)
    found = []
    for title, remark, lines, x_label, x_text, y_text in drawn:
        svg = chart(lines, f"{title} over {x_label}", x_label, x_text, y_text)
        small = f" <small>{remark}</small>" if remark else ""
        if svg:
            caption = f'<figcaption>{title}{small}</figcaption><ul class="legend">{legend}</ul>'
            found.append(f"<figure>{caption}{svg}</figure>")
    return found or ["<p>No run has written a row yet.</p>"]


def compare(runs: list[RunRecord]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """{hyperparameter: its value in each run}: of those that differ, and of those that do not."""
    names = dict.fromkeys(name for run in runs for name in run.hyperparameters if name not in NOT_COMPARED)
    differing, shared = {}, {}
    for name in names:
        values = [shown(run.hyperparameters[name]) if name in run.hyperparameters else "" for run in runs]
        (shared if len(set(values)) == 1 else differing)[name] = [escape(value) for value in values]
    return differing, shared


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def results(runs: list[RunRecord]) -> dict[str, list[str]]:
    """{figure: of each run}, as HTML, without those that no run has."""

    def least_marked(values: list[float | None]) -> list[str]:
        finite = [v for v in values if v is not None and math.isfinite(v)]
        mark = len(finite) > 1
        return [
            "" if v is None else f'<span class="best">{v:.4f}</span>' if mark and v == min(finite) else f"{v:.4f}"
            for v in values
        ]

    def of(name: str, text: Any) -> list[str]:
        return [escape(text(run.summary[name])) if run.summary.get(name) is not None else "" for run in runs]

    validations = [run.points("step", "val_loss") for run in runs]
    best = [f"{run.best[1]:.4f} at step {int(run.best[0]):,}" if run.best else "" for run in runs]
    peaks = [run.points("tokens", "peak_memory_bytes") for run in runs]
    last_row = [run.rows[-1] if run.rows else {} for run in runs]
    table = {
        "status": [escape(run.status) for run in runs],
        "method": of("method", str),
        "base in": of("base_quantization", str),
        "parameters that train": of("trainable_parameters", "{:,}".format),
        "steps": [f"{int(row['step']):,}" if row else "" for row in last_row],
        "tokens": [f"{int(row['tokens'] or 0):,}" if row else "" for row in last_row],
        "training time": [duration(row["seconds"]) if row else "" for row in last_row],
        "tokens per second": [
            f"{row['tokens'] / row['seconds']:,.0f}" if row.get("seconds") else "" for row in last_row
        ],
        "peak memory": [f"{max(y for _, y in peak) / 1e9:.2f} GB" if peak else "" for peak in peaks],
        "validation loss at first": [f"{p[0][1]:.4f}" if p else "" for p in validations],
        "validation loss at last": least_marked([p[-1][1] if p else None for p in validations]),
        "lowest validation loss": best,
        "probe, before": of("probe_loss_first", "{:.4f}".format),
        "probe, after": of("probe_loss_last", "{:.4f}".format),
    }
    return {name: values for name, values in table.items() if any(values)}


def table(title: str, rows: dict[str, list[str]], runs: list[RunRecord], header: bool = True) -> str:
    """A row for each entry, a column for each run; the values are HTML."""
    swatches = [f'<span class="swatch series-{run.series}"></span>{escape(run.name)}' for run in runs]
    heads = "".join(f'<th class="run" scope="col">{swatch}</th>' for swatch in swatches)
    cells = {name: "".join(f"<td>{value}</td>" for value in values[: len(runs)]) for name, values in rows.items()}
    body = "".join(f'<tr><th scope="row">{escape(name)}</th>{row}</tr>' for name, row in cells.items())
    head = f"<thead><tr><th></th>{heads}</tr></thead>" if header else ""
    heading = f"<h2>{title}</h2>" if title else ""
    return f'{heading}<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def short(value: float) -> str:
    """12.5k, 3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def number(value: float) -> str:
    return f"{value:.4g}".replace("e-0", "e-")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
