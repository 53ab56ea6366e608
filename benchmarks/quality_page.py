"""The page of benchmarks/methods_quality.py: tables, pictures, and which of the tips held, written from the cells."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from textwrap import fill
from typing import Any

PLAIN = "LoRA"  # what the tips are compared with
Cell = dict[str, Any]
# what is changed of plain LoRA, the tip, and what it expects of the change
TIPS = {
    "LoRA, queries and values alone": ("adapt all layers, not queries and values alone", "worse"),
    "LoRA, alpha half the rank": ("take alpha twice the rank, not half of it", "worse"),
    "LoRA, alpha the rank": ("take alpha twice the rank, not the rank", "worse"),
    "LoRA, alpha four times the rank": ("take alpha twice the rank, not four times", "worse"),
    "LoRA, rank 2": ("a rank of 2 is too small", "worse"),
    "LoRA, rank 32": ("a larger rank learns more", "better"),
    "LoRA, constant rate": ("the schedule matters little with AdamW", "equal"),
    "LoRA, SGD": ("the optimizer matters little", "equal"),
    "LoRA, three epochs": ("one epoch is enough", "not better"),
    "QLoRA": ("a base in NF4 costs hardly any quality", "not worse"),
}


@dataclass(frozen=True)
class Cells:
    """Holds what was measured, by "method / task / seed"; runs of the grid have seed 0, and their rate behind it."""

    found: dict[str, Cell]
    tasks: tuple[str, ...]

    def tried(self, name: str) -> list[Cell]:
        """Return a method's runs of the grid of learning rates."""
        return [cell for key, cell in self.found.items() if key.startswith(f"{name} / {self.tasks[0]} / 0 / ")]

    def best(self, name: str) -> Cell:
        """Return the run of the grid whose validation loss was the lowest."""
        return min(self.tried(name), key=lambda cell: cell["val_loss_last"])

    def seeds(self, name: str) -> dict[str, list[Cell]]:
        """Return a method's runs by seed, in the order of the tasks: of the seeds with which it learned all of them."""
        by_seed: dict[str, dict[str, Cell]] = {}
        for key, cell in self.found.items():
            own, task, seed, *grid = key.split(" / ")
            if own == name and not grid:
                by_seed.setdefault(seed, {})[task] = cell
        whole = {seed: runs for seed, runs in by_seed.items() if len(runs) == len(self.tasks)}
        return {seed: [runs[task] for task in self.tasks] for seed, runs in sorted(whole.items())}

    def timed(self, runs: list[Cell]) -> list[Cell]:
        """Return those of the runs whose seconds and memory count: on the machine that had most of all runs."""
        (most, _), *_ = self.machines
        return [cell for cell in runs if cell["machine"] == most] or runs

    @property
    def machines(self) -> list[tuple[str, int]]:
        """Return the machines with how many runs they had, most of them first."""
        return Counter(cell["machine"] for cell in self.found.values()).most_common()


def page(cells: Cells, methods: list[str], tips: list[str], words: str, held_out: int, date: str) -> str:
    """Return the page.

    Args:
        words: what was done, in whole sentences, the first of them of the command.
        date: that of the last run.
    """
    how = (
        f"{words} Exact: the share of {held_out} held-out answers that are right to the letter, the mean over tasks "
        "and seeds (that of each task; how many seeds). Forgotten: by how much the loss on the beginning of the "
        "license rose. Seconds are those of training with the C++ kernels throughout (`--compile true`; speeds by the "
        "usual choice: [methods_speed_cpu](methods_speed_cpu.md)). Memory is what a step on the longest "
        f"row takes beside the model (as planned). {where_each(cells)} {date}."
    )
    parts = ["# What each method is worth", wrapped(how)]
    for names in (methods, [PLAIN, *tips]):
        parts += table(HEAD, [line for name in names if (line := row(name, cells))])
    parts += table(GRID_HEAD, [line for name in [*methods, *tips] if (line := grid_row(name, cells))], GRID_WORDS)
    if any(map(cells.tried, methods)):
        parts.append("![exact matches](methods_quality_exact.png)\n![validation loss](methods_quality_loss.png)")
    verdicts = [line for name in TIPS if (line := verdict(name, cells))]
    if verdicts:
        parts += ["## Which tips held", wrapped(TIPS_WORDS), "\n".join(verdicts)]
    return "\n\n".join(parts) + "\n"


HEAD = (
    "| method | exact | val. loss | forgotten | trained | file | seconds | step MB (planned) | rate |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
)
GRID_HEAD = ("| method | learning rate: validation loss, exact; the lowest loss in bold |", "|---|---|")
GRID_WORDS = "## The grid\n\nOne run at each learning rate, on the first task, and on past an end that was the best."
TIPS_WORDS = (
    "Each beside plain LoRA (rank 8, alpha 16, all layers, AdamW, a cosine, one epoch) with its own learning rate: the "
    "difference of exact matches and of the validation loss, means over tasks, with twice the standard error over the "
    "seeds. A difference counts if it is greater than that. The rates were chosen by one run on a task that most "
    "learn: some of each difference is that of the rates, and what was given a higher one came further on the harder "
    "tasks."
)


def table(head: tuple[str, str], lines: list[str], title: str = "") -> list[str]:
    return [*filter(None, [title]), "\n".join([*head, *lines])] if lines else []


def wrapped(text: str) -> str:
    return fill(text, 120, break_on_hyphens=False, break_long_words=False)


def where(found: dict[str, Any]) -> str:
    """Return the machine, versions and date of a results file in words."""
    return f"{machine(found)}; {found['date']}."


def machine(found: dict[str, Any]) -> str:
    """Return the machine and torch's version of a results file in words."""
    cpu, extensions = found["machine"], ", ".join(found["machine"]["extensions"])
    return f"{cpu['cores']} cores of {cpu['cpu']} ({extensions}), torch {found['torch']}"


def where_each(cells: Cells) -> str:
    """Return the machines in words; of several, how many runs each had, and whose seconds count."""
    (first, _), *others = cells.machines
    if not others:
        return f"{first};"
    said = "; ".join(f"{n} runs on {name}" for name, n in cells.machines)
    return f"{said}: seconds and memory are of the former;"


def row(name: str, cells: Cells) -> str | None:
    """Return a method's line of the table, once it has learned every task with some seed."""
    seeds = cells.seeds(name)
    if not seeds:
        return None
    every = [cell for runs in seeds.values() for cell in runs]
    exact = [fmean(cell["exact"] for cell in runs) for runs in zip(*seeds.values(), strict=True)]  # of each task
    timed = cells.timed(every)
    forgotten = fmean(cell["probe_loss_last"] - cell["probe_loss_first"] for cell in every)
    each = ", ".join(f"{100 * task:.0f}" for task in exact)
    return (
        f"| {name} | {fmean(exact):.0%} ({each}; {len(seeds)}) | {loss_of(every):.3f} | {forgotten:+.3f} "
        f"| {every[0]['trainable_parameters']:,} | {every[0]['file_bytes'] / 1e6:.1f} MB "
        f"| {fmean(cell['seconds'] for cell in timed):.0f} | {memory(timed)} | {every[0]['learning_rate']:.2g} |"
    )


def grid_row(name: str, cells: Cells) -> str | None:
    """Return a method's line of the grid, once all of its rates were tried."""
    tried = sorted(cells.tried(name), key=lambda cell: cell["learning_rate"])
    if len(tried) < 3:
        return None
    best = cells.best(name)
    fields = []
    for cell in tried:
        bold = "**" if cell is best else ""
        fields.append(f"{bold}{cell['learning_rate']:.2g}: {cell['val_loss_last']:.3f}{bold}, {cell['exact']:.0%}")
    return f"| {name} | {'; '.join(fields)} |"


def loss_of(runs: list[Cell]) -> float:
    return fmean(cell["val_loss_last"] for cell in runs)


def memory(runs: list[Cell]) -> str:
    measured, planned = (max(cell[f"step_bytes_{kind}"] for cell in runs) / 1e6 for kind in ("measured", "planned"))
    return f"{measured:.0f} ({planned:.0f})"


@dataclass(frozen=True)
class Difference:
    """Holds the mean difference of a figure from plain LoRA's over the seeds, and twice its standard error."""

    mean: float
    error: float

    @property
    def sign(self) -> int:
        """Return -1 or 1 for one that counts, else 0."""
        return 0 if abs(self.mean) <= self.error else 1 if self.mean > 0 else -1


def differences(name: str, cells: Cells) -> tuple[Difference, Difference] | None:
    """Return the differences of exact matches and of the validation loss; None where they have no two seeds in common.

    Runs with one seed have the same rows, and are compared with each other.
    """
    own, plain = cells.seeds(name), cells.seeds(PLAIN)
    both = own.keys() & plain.keys()
    if len(both) < 2:
        return None
    found = []
    for figure in ("exact", "val_loss_last"):
        each = [fmean(a[figure] - b[figure] for a, b in zip(own[s], plain[s], strict=True)) for s in sorted(both)]
        found.append(Difference(fmean(each), 2 * stdev(each) / len(each) ** 0.5))
    return found[0], found[1]


def verdict(name: str, cells: Cells) -> str | None:
    """Return the line on a tip: whether it held, by what the change did to answers and loss."""
    found = differences(name, cells)
    if found is None:
        return None
    exact, loss = found
    signs = {exact.sign, -loss.sign} - {0}
    outcome = "mixed" if len(signs) == 2 else {1: "better", -1: "worse"}[signs.pop()] if signs else "equal"
    tip, expected = TIPS[name]
    accepted = {"not better": ("equal", "worse"), "not worse": ("equal", "better")}.get(expected, (expected,))
    said = "held" if outcome in accepted else "no difference seen" if outcome == "equal" else "did not hold"
    words = (
        f"- **{tip}: {said}.** {name}: exact {100 * exact.mean:+.1f} ± {100 * exact.error:.1f} points, validation loss "
        f"{loss.mean:+.4f} ± {loss.error:.4f}{'; the two do not agree' if outcome == 'mixed' else ''}."
    )
    return fill(words, 120, subsequent_indent="  ", break_on_hyphens=False)


def draw(cells: Cells, names: list[str], stem: Path) -> None:
    """Draw exact matches against trained parameters, and the validation losses, into STEM_exact.png and STEM_loss.png.

    Of methods that have learned every task; if none has, of the runs of the grid with the lowest loss.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = {name: list(seeds.values()) for name in names if (seeds := cells.seeds(name))}
    what = "mean over tasks and seeds"
    if not runs:
        runs = {name: [[cells.best(name)]] for name in names if cells.tried(name)}
        what = f"{cells.tasks[0]} alone, one run, the best of the learning rates"
    if not runs:
        return
    for name, paint in (("exact", draw_exact), ("loss", draw_losses)):
        figure, axes = pyplot.subplots(figsize=(8.5, 5.5), layout="constrained")
        paint(axes, runs)
        axes.set_title(what, fontsize=10)
        axes.grid(alpha=0.3)
        figure.savefig(f"{stem}_{name}.png", dpi=120)
        pyplot.close(figure)


Runs = dict[str, list[list[Cell]]]  # of each method, for each seed


def draw_exact(axes: Any, runs: Runs) -> None:
    """Draw exact matches over trained parameters, each point with its name beside it."""
    points = [
        (seeds[0][0]["trainable_parameters"], 100 * fmean(cell["exact"] for own in seeds for cell in own), name)
        for name, seeds in runs.items()
    ]
    trained, exact, _ = zip(*points, strict=True)
    axes.plot(trained, exact, "o", color="tab:blue", markersize=4)
    axes.set(xscale="log", xlabel="trained parameters", ylabel="exact matches, %")
    axes.margins(x=0.15, y=0.1)
    write_names(axes, points)


def write_names(axes: Any, points: list[tuple[int, float, str]]) -> None:
    """Write each point's name beside it, as high as points and names leave room, with a line where it is lower."""
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # so that boxes of text are known
    centers = axes.transData.transform([point[:2] for point in points])
    taken = [Bbox.from_bounds(across - 4, up - 4, 8, 8) for across, up in centers]
    for trained, exact, name in sorted(points, key=lambda point: (-point[1], point[0])):
        label = axes.annotate(name, (trained, exact), (8, -3), textcoords="offset points", fontsize=7)
        while any(label.get_window_extent().overlaps(box) for box in taken):
            label.xyann = label.xyann[0], label.xyann[1] - 1
        taken.append(label.get_window_extent())
        across, up = label.xyann
        if up < -3:
            axes.annotate(
                "", (trained, exact), (across, up + 3), textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0},
            )  # fmt: skip


def draw_losses(axes: Any, runs: Runs) -> None:
    """Draw each method's validation loss, the lowest on top, as a line from the least seed to the greatest."""
    from matplotlib.ticker import LogLocator, NullLocator

    means = {name: [loss_of(own) for own in seeds] for name, seeds in runs.items()}
    order = sorted(means, key=lambda name: fmean(means[name]), reverse=True)
    for place, name in enumerate(order):
        axes.plot([min(means[name]), max(means[name])], [place, place], color="tab:blue", linewidth=2)
        axes.plot(fmean(means[name]), place, "o", color="tab:blue")
    axes.set_yticks(range(len(order)), order, fontsize=8)
    axes.set(xscale="log", xlabel="validation loss, nats per supervised token")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
