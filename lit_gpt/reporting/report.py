"""Puts runs side by side in one HTML page that needs neither network nor script and can be printed."""

import json
import math
import time
from collections.abc import Sequence
from os.path import commonpath
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from lit_gpt.errors import UsageError, UserError
from lit_gpt.files import atomic
from lit_gpt.reporting.charts import Axis, Chart, Kind, Line, Text, bounds, smooth, thin, ticks
from lit_gpt.reporting.runs import RunRecord, duration, read_run

GENERATOR = '<meta name="generator" content="Lit-GPT report">'  # by which report.html.jinja marks its pages
NOT_COMPARED = {"out_dir", "resume", "logger"}
COLORS = 8  # series of the style sheet; further runs begin anew


def report(out_dirs: list[Path], out: Path) -> None:
    """Write the page on the runs in `out_dirs` to `out`, and print what it shows; see `write_page`."""
    for run in write_page(out_dirs, out):
        print(f"{run.name}: {run.status}")
    print(f"wrote {out}")


def write_page(out_dirs: list[Path], out: Path, settings: Sequence[str] = ()) -> list[RunRecord]:
    """Write the page on the runs in `out_dirs` to `out`, and return these.

    Args:
        settings: hyperparameters in which the runs of a sweep differ. The runs, which come in order, are numbered and
            listed with these, and loss and time are drawn over each that has several values.

    Raises:
        UserError: a folder is no run, or `out` holds something else than a report.
    """
    if not out_dirs:
        raise UsageError("expected the out_dir of a run, or of several: python scripts/report.py out/lora/a out/lora/b")
    folders = [folder.resolve() for folder in out_dirs]
    if len(set(folders)) < len(folders):
        raise UsageError("OUT_DIR: a folder is named twice")
    if out.exists() and GENERATOR not in out.read_text(encoding="utf-8", errors="replace")[:500]:
        raise UserError(f"--out {out}: holds something else than a report; choose another")
    common = Path(commonpath([folder.parent for folder in folders]))
    names = [str(n if settings else folder.relative_to(common)) for n, folder in enumerate(folders, 1)]
    runs = [read_run(f, name, i % COLORS) for i, (f, name) in enumerate(zip(out_dirs, names, strict=True))]
    with atomic(out) as temporary:
        temporary.write_text(page(runs, settings), encoding="utf-8")
    return runs


def page(runs: list[RunRecord], settings: Sequence[str]) -> str:
    """Return the page as HTML."""
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    differing, shared = compare(runs)
    return environment.get_template("report.html.jinja").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        colors=COLORS,
        runs=runs,
        ranking=ranking(runs, settings) if settings else None,
        results=results(runs),
        charts=settings_charts(runs, settings) + charts(runs),
        differing=differing,
        shared=shared,
    )


def ranking(runs: list[RunRecord], settings: Sequence[str]) -> list[list[str]]:
    """Return the lines of a table of the runs, its head first: settings, validation loss at last, training time."""
    lines = [[*settings, "loss", "time"]]
    for run in runs:
        losses = [loss for _, loss in run.points("step", "val_loss")]
        chosen = [shown(run.hyperparameters[name]) if name in run.hyperparameters else "" for name in settings]
        time = duration(run.rows[-1]["seconds"]) if run.rows else ""
        lines.append([*chosen, f"{losses[-1]:.4f}" if losses else "", time])
    return lines


def charts(runs: list[RunRecord]) -> list[Chart]:
    """Return a chart of each curve that a run has."""
    whole = max((row["seconds"] for run in runs for row in run.rows), default=0.0)
    unit, size = next(u for u in (("h", 3600), ("min", 60), ("s", 1)) if whole >= 2 * u[1] or u[1] == 1)
    by_tokens = ("tokens", 1, "tokens", short)
    by_time = ("seconds", size, f"{unit} of training, without validation", number)
    nats = "nats per supervised token"
    drawn = (
        chart(runs, "Training loss", f"{nats}; smoothed", "smoothed", by_tokens, "loss"),
        chart(runs, "Training loss over time", f"{nats}; smoothed", "smoothed", by_time, "loss"),
        chart(runs, "Validation loss", nats, "marked", by_tokens, "val_loss"),
        chart(runs, "Score", "by the run's metric, of 1", "marked", by_tokens, "score"),
        chart(runs, "Learning rate", "", "line", by_tokens, "lr"),
        chart(runs, "Speed", "tokens per second; smoothed", "smoothed", by_tokens, "tokens_per_second", short),
        chart(runs, "Peak memory", "GB", "line", by_tokens, "peak_memory_bytes", lambda size: number(size / 1e9)),
    )
    return [chart for chart in drawn if chart]


def settings_charts(runs: list[RunRecord], settings: Sequence[str]) -> list[Chart]:
    """Return two charts of each hyperparameter that has several values: lowest validation loss, and time, over it."""
    drawn = []
    for name in settings:
        measured = [run for run in runs if name in run.hyperparameters and run.best]
        places, axis = setting_axis([run.hyperparameters[name] for run in measured])
        if axis is None:
            continue
        losses, seconds = [run.best[1] for run in measured if run.best], [run.rows[-1]["seconds"] for run in measured]
        titles = (("Lowest validation loss", "nats per supervised token"), ("Training time", "s, without validation"))
        for (title, remark), values in zip(titles, (losses, seconds), strict=True):
            points = zip(measured, places, values, strict=True)
            lines = [Line([(x, y)], run.series, run.name, "marked") for run, x, y in points]
            upright = Axis(ticks(*bounds(values)), Chart.HEIGHT - 40, 10, number)
            drawn.append(Chart(f"{title} by {name}", remark, name, lines, axis, upright))
    return drawn


def setting_axis(values: list[Any]) -> tuple[list[float], Axis | None]:
    """Return where each value of a hyperparameter lies, and the axis; None if they are all one.

    Each distinct value has a tick, one as far from the next as another: a grid is most often of ratios.
    """
    numbers = all(isinstance(value, int | float) for value in values)
    distinct = sorted(set(values)) if numbers else list(dict.fromkeys(map(shown, values)))
    texts = [shown(value)[:12] for value in distinct]
    axis = Axis([float(i) for i in range(len(texts))], 50, Chart.WIDTH - 12, lambda place: texts[round(place)])
    places = [float(distinct.index(value if numbers else shown(value))) for value in values]
    return places, axis if len(distinct) > 1 else None


def short(value: float) -> str:
    """Return a number such as 12.5k or 3M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def number(value: float) -> str:
    return f"{value:.4g}".replace("e-0", "e-")


def chart(
    runs: list[RunRecord], title: str, remark: str, kind: Kind, x_axis: tuple[str, float, str, Text], y: str,
    y_text: Text = number,
) -> Chart | None:  # fmt: skip
    """Return the chart of a column of metrics.csv, with a line for each run; None if no run has it.

    Args:
        x_axis: the column over which it is drawn, the unit to draw that in, its label and how its values are written.
    """
    x, unit, x_label, x_text = x_axis
    lines = []
    for run in runs:
        points = [(a / unit, b) for a, b in run.points(x, y)]
        if kind == "smoothed":
            lines.append(Line(thin(points), run.series, kind="faint"))
            points = smooth(points)
        lines.append(Line(thin(points), run.series, run.name, kind))
    clear = [point for line in lines if line.kind != "faint" for point in line.points]
    if not clear:
        return None
    lines.sort(key=lambda line: line.kind != "faint")
    across = Axis(ticks(0.0, max(x for x, _ in clear)), 50, Chart.WIDTH - 12, x_text)
    upright = Axis(ticks(*bounds([y for _, y in clear])), Chart.HEIGHT - 40, 10, y_text)
    return Chart(title, remark, x_label, lines, across, upright)


def compare(runs: list[RunRecord]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return {hyperparameter: its value in each run}: those that differ, and those that do not."""
    names = dict.fromkeys(name for run in runs for name in run.hyperparameters if name not in NOT_COMPARED)
    differing: dict[str, list[str]] = {}
    shared: dict[str, list[str]] = {}
    for name in names:
        values = [shown(run.hyperparameters[name]) if name in run.hyperparameters else "" for run in runs]
        (shared if len(set(values)) == 1 else differing)[name] = values
    return differing, shared


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def results(runs: list[RunRecord]) -> dict[str, list[str]]:
    """Return {figure: its value for each run}, without the figures that no run has; the least last loss is in bold."""
    last = [losses[-1][1] for run in runs if (losses := run.points("step", "val_loss"))]
    finite = [loss for loss in last if math.isfinite(loss)]
    columns = [result(run, min(finite) if len(finite) > 1 else None) for run in runs]
    rows = {name: [column[name] for column in columns] for name in columns[0]}
    return {name: values for name, values in rows.items() if any(values)}


def result(run: RunRecord, best: float | None) -> dict[str, str]:
    """Return the figures of a run, "" where it has none. `best` is the lowest last validation loss of several runs."""

    def summary(name: str, form: str = "{}") -> str:
        value = run.summary.get(name)
        return "" if value is None else form.format(value)

    row = run.rows[-1] if run.rows else {}
    losses = [loss for _, loss in run.points("step", "val_loss")]
    peaks = [peak for _, peak in run.points("tokens", "peak_memory_bytes")]
    last = f"{losses[-1]:.4f}" if losses else ""
    if losses and losses[-1] == best:
        last = Markup('<span class="best">{}</span>').format(last)
    return {
        "status": run.status,
        "method": summary("method"),
        "base in": summary("base_quantization"),
        "parameters that train": summary("trainable_parameters", "{:,}"),
        "steps": f"{int(row['step']):,}" if row else "",
        "tokens": f"{int(row['tokens']):,}" if row else "",
        "training time": duration(row["seconds"]) if row else "",
        "tokens per second": f"{row['tokens'] / row['seconds']:,.0f}" if row.get("seconds") else "",
        "peak memory": f"{max(peaks) / 1e9:.2f} GB" if peaks else "",
        "validation loss at first": f"{losses[0]:.4f}" if losses else "",
        "validation loss at last": last,
        "lowest validation loss": f"{run.best[1]:.4f} at step {int(run.best[0]):,}" if run.best else "",
        "score at first": summary("score_first", "{:.1%}"),
        "score at last": summary("score_last", "{:.1%}"),
        "probe, before": summary("probe_loss_first", "{:.4f}"),
        "probe, after": summary("probe_loss_last", "{:.4f}"),
    }
