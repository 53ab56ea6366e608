"""Computes line charts, which report.html.jinja draws in SVG, in the page's colors for light and dark.

matplotlib's drawings would have colors of their own, and take a second to make.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar, Literal

MOST_POINTS = 250  # of a line; more cannot be told apart
Point = tuple[float, float]
Kind = Literal["line", "smoothed", "marked", "faint"]
Text = Callable[[float], str]  # writes a value


@dataclass(frozen=True)
class Line:
    """Holds a line of a chart.

    Attributes:
        series: the number of its color in the style sheet, `--series-0` and so on.
        name: the run's, shown where the pointer rests on a mark.
        kind: marked lines have a mark at each point; faint ones lie in the background and are cut off where the others
            do not reach.
    """

    points: list[Point]
    series: int
    name: str = ""
    kind: Kind = "line"


@dataclass(frozen=True)
class Axis:
    """Places values between the first tick and the last, which lie at `start` and `end` in the drawing."""

    ticks: list[float]
    start: int
    end: int
    text: Text

    def place(self, value: float) -> float:
        """Return where a value lies in the drawing, or somewhere outside of it."""
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return round(min(max(self.start + share * (self.end - self.start), -Chart.HEIGHT), 2 * Chart.HEIGHT), 1)


@dataclass(frozen=True)
class Chart:
    """Holds lines between two axes, in a drawing that a page scales to the width that it has."""

    WIDTH: ClassVar[int] = 400
    HEIGHT: ClassVar[int] = 250
    title: str
    remark: str
    x_label: str
    lines: list[Line]
    x: Axis
    y: Axis


def thin(points: Sequence[Point]) -> list[Point]:
    """Return the finite points, or the means of neighbors where they are too many."""
    points = [p for p in points if all(map(math.isfinite, p))]
    size = max(1, math.ceil(len(points) / MOST_POINTS))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Return each point as the mean of about a twentieth of all, centered on it."""
    points = [p for p in points if all(map(math.isfinite, p))]
    sums, last = [0.0, *itertools.accumulate(y for _, y in points)], len(points) - 1
    reaches = (min(len(points) // 40, i, last - i) for i in range(len(points)))
    return [(points[i][0], (sums[i + r + 1] - sums[i - r]) / (2 * r + 1)) for i, r in enumerate(reaches)]


def bounds(values: list[float]) -> tuple[float, float]:
    """Return the least and the greatest value, or 0 for the least if that costs under a third of the height."""
    low, high = min(values), max(values)
    return (0.0, high) if 0 <= low < high / 3 or low == high > 0 else (low, high)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers, 1, 2 or 5 times a power of ten apart, from at most `low` to at least `high`."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]
