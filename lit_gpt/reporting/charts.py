"""Line charts as SVG, to stand in an HTML page: no script, no network, colours from the page's style sheet."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from statistics import fmean

WIDTH, HEIGHT = 400, 250  # of the drawing; a page scales it to the width that it has
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 40  # margins
MOST_POINTS = 250  # of a line; more cannot be told apart
Point = tuple[float, float]


@dataclass
class Line:
    """A line, or with `marked` points joined by one.

    Args:
        series: which of the style sheet's colours, `--series-0` and so on.
        name: whose it is, told where the pointer rests on a mark.
        faint: drawn in the background, and cut off where the others do not reach.
    """

    points: list[Point]
    series: int
    name: str = ""
    marked: bool = False
    faint: bool = False


def chart(
    lines: list[Line], title: str, x_label: str, x_text: Callable[[float], str], y_text: Callable[[float], str]
) -> str:
    """The chart of all lines, or "" if none has a point."""
    lines = [Line(thin(line.points), line.series, line.name, line.marked, line.faint) for line in lines]
    clear = [p for line in lines if not line.faint for p in line.points]
    if not clear:
        return ""
    x_ticks, y_ticks = ticks(0.0, max(x for x, _ in clear)), ticks(*bounds([y for _, y in clear]))
    (x_low, x_high), (y_low, y_high) = (x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1])

    def at(point: Point) -> Point:
        x = LEFT + (point[0] - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (point[1] - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(min(max(y, -HEIGHT), 2 * HEIGHT), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in y_ticks:
        y = at((x_low, tick))[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{escape(y_text(tick))}</text>')
    for tick in x_ticks:
        x = at((tick, y_low))[0]
        anchor = "end" if tick == x_high else "middle"
        x = WIDTH if tick == x_high else x
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">{escape(x_text(tick))}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    # a nested svg cuts off what lies outside of the axes
    box = f'x="{LEFT}" y="{TOP - 5}" width="{WIDTH - LEFT}" height="{HEIGHT - TOP - BOTTOM + 10}"'
    parts.append(f'<svg {box} viewBox="{LEFT} {TOP - 5} {WIDTH - LEFT} {HEIGHT - TOP - BOTTOM + 10}">')
    for line in sorted(lines, key=lambda line: not line.faint):
        parts.append(drawn(line, [at(point) for point in line.points], x_text, y_text))
    return "".join([*parts, "</svg></svg>"])


def drawn(line: Line, places: list[Point], x_text: Callable[[float], str], y_text: Callable[[float], str]) -> str:
    kind = f"series-{line.series} " + ("faint" if line.faint else "marked" if line.marked else "line")
    path = " ".join(f"{x},{y}" for x, y in places)
    svg = f'<polyline class="{kind}" points="{path}"/>'
    if line.marked or len(places) == 1:  # a line of one point cannot be seen
        for (x, y), point in zip(places, line.points, strict=True):
            told = f"{line.name}: {y_text(point[1])} at {x_text(point[0])}"
            svg += f'<circle class="series-{line.series} mark" cx="{x}" cy="{y}" r="3"><title>{escape(told)}</title>'
            svg += "</circle>"
    return svg


def thin(points: list[Point]) -> list[Point]:
    """The finite points, or the means of neighbours where they are too many."""
    points = [p for p in points if all(map(math.isfinite, p))]
    size = math.ceil(len(points) / MOST_POINTS)
    groups = (points[i : i + size] for i in range(0, len(points), size)) if size > 1 else ([p] for p in points)
    return [(fmean(x for x, _ in group), fmean(y for _, y in group)) for group in groups]


def smooth(points: list[Point]) -> list[Point]:
    """Each point as the mean of about a twentieth of all, centred on it."""
    points = [p for p in points if all(map(math.isfinite, p))]
    reach = len(points) // 40
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    found = []
    for i, (x, _) in enumerate(points):
        r = min(reach, i, len(points) - 1 - i)
        found.append((x, (sums[i + r + 1] - sums[i - r]) / (2 * r + 1)))
    return found


def bounds(values: list[float]) -> tuple[float, float]:
    """From least to greatest; from 0 if that costs less than a third of the height."""
    low, high = min(values), max(values)
    return (0.0, high) if 0 <= low < high / 3 or low == high > 0 else (low, high)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, from at most `low` to at least `high`."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]
