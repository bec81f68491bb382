"""Charts as inline SVG, for a page without scripts: lines over K or epochs, and groups of bars.

Colours and fonts are those of the page: a series is drawn in its class, `s0`, `s1`, ... Texts are
escaped. Every chart has a description for those who do not see it.
"""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 460, 280  # of the drawing's own units; on a page it is as wide as there is room
LEFT, RIGHT, TOP, BOTTOM = 32, 14, 10, 48  # margins
SERIES = 6  # colours of lines
TICKS = (1, 2, 5, 10, 20, 50, 100)
PERCENTS = (0, 20, 40, 60, 80, 100)


class Line(NamedTuple):
    """A line of a chart: a value in percent for K = 1, 2, ..., or a sum for epochs 1, 2, ..."""

    name: str
    values: np.ndarray  # (K,)
    band: tuple[np.ndarray, np.ndarray] | None = None  # lower and upper bounds (K,)


class Bar(NamedTuple):
    """A bar of a chart, in percent."""

    value: float
    interval: tuple[float, float] | None = None
    hint: str = ""  # a text that a pointer shows


def height_of(value: float, ticks: Sequence[float] = PERCENTS) -> float:
    """Where a value lies, from the top, on an axis from the first of its ticks to the last."""
    low, high = ticks[0], ticks[-1]
    return TOP + (HEIGHT - TOP - BOTTOM) * (high - min(max(value, low), high)) / (high - low)


def ticks_around(low: float, high: float) -> list[float]:
    """Round numbers, four to seven, from below `low` to above `high`, at least one apart."""
    middle, room = (low + high) / 2, max(high - low, 1)
    low, high = middle - room / 2, middle + room / 2
    size = 10 ** math.floor(math.log10(room))
    step = next(x for x in (0.2 * size, 0.5 * size, size, 2 * size) if room / x <= 5)
    first = math.floor(low / step)
    return [k * step for k in range(first, math.ceil(high / step) + 1)]


def text(x: float, y: float, content: object, anchor: str = "middle", kind: str = "") -> str:
    kind, content = f' class="{kind}"' if kind else "", html.escape(str(content))
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{content}</text>'


def frame(x_title: str, ticks: Sequence[float] = PERCENTS) -> list[str]:
    """The grid, the upright axis with its ticks, and the title of the other axis."""
    parts = []
    for value in ticks:
        y = height_of(value, ticks)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(text(LEFT - 6, y + 4, f"{value:g}", "end"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    return [*parts, text(middle, HEIGHT - 4, x_title, kind="title")]


def drawing(parts: Iterable[str], description: str) -> str:
    about = f'role="img" aria-label="{html.escape(description)}"'
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" {about}>'
    return "".join([head, *parts, "</svg>"])


def path_of(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def curves(lines: Sequence[Line], x_title: str, description: str) -> str:
    """Lines over K = 1, 2, ..., with a logarithmic axis, and their bands."""
    last = max(len(line.values) for line in lines)

    def x_of(k: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(k) / max(math.log(last), 1e-9)

    def points(values: np.ndarray) -> list[tuple[float, float]]:
        return [(x_of(k), height_of(value)) for k, value in enumerate(values, 1)]

    parts = frame(x_title)
    for k in (k for k in TICKS if k <= last):
        parts += tick(x_of(k), k)
    return drawing([*parts, *drawn(lines, points)], description)


def over_epochs(
    lines: Sequence[Line], thin: Sequence[tuple[int, np.ndarray]], description: str
) -> str:
    """Lines over epochs 1, 2, ..., and thin ones, each with the number of its line's colour.

    The upright axis is as long as the thin lines need: bands may end at its ends.
    """
    last = max(len(line.values) for line in lines)
    values = np.concatenate([values for _, values in thin])
    ticks = ticks_around(values.min(), values.max())

    def x_of(epoch: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (epoch - 1) / max(last - 1, 1)

    def points(values: np.ndarray) -> list[tuple[float, float]]:
        return [(x_of(epoch), height_of(value, ticks)) for epoch, value in enumerate(values, 1)]

    parts = frame("epochs", ticks)
    for epoch in range(1, last + 1, max(1, math.ceil(last / 10))):
        parts += tick(x_of(epoch), epoch)
    for number, values in thin:
        parts.append(f'<path class="seed s{number}" d="{path_of(points(values))}"/>')
    parts += drawn(lines, points)
    for number, line in enumerate(lines):  # a line of one epoch has no length
        for x, y in points(line.values):
            parts.append(f'<circle class="dot s{number}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    return drawing(parts, description)


def tick(x: float, label: object) -> list[str]:
    """A line of the grid at x, and its label below."""
    line = f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
    return [line, text(x, HEIGHT - BOTTOM + 18, label)]


def drawn(lines: Sequence[Line], points: Callable) -> list[str]:
    """The bands and the lines; `points` gives the places of a line's values."""
    parts = []
    for number, line in enumerate(lines):
        if line.band is not None:
            low, high = map(points, line.band)
            parts.append(f'<path class="band s{number}" d="{path_of(high + low[::-1])}Z"/>')
    for number, line in enumerate(lines):
        parts.append(f'<path class="line s{number}" d="{path_of(points(line.values))}"/>')
    return parts


def bars(groups: Sequence[tuple[str, str, Sequence[Bar]]], x_title: str, description: str) -> str:
    """Groups of bars: of each its label, a second line below it, and its bars, one per series."""
    parts = frame(x_title)
    room = (WIDTH - LEFT - RIGHT) / len(groups)
    for place, (label, below, group) in enumerate(groups):
        start, wide = LEFT + room * (place + 0.1), room * 0.8 / len(group)
        for number, bar in enumerate(group):
            x, y = start + wide * number, height_of(bar.value)
            parts.append(
                f'<rect class="bar s{number}" x="{x:.1f}" y="{y:.1f}" width="{wide * 0.9:.1f}" '
                f'height="{height_of(0) - y:.1f}"><title>{html.escape(bar.hint)}</title></rect>'
            )
            if bar.interval:
                middle, (low, high) = x + wide * 0.45, map(height_of, bar.interval)
                tips = "".join(f"M{middle - 3:.1f} {y:.1f}h6" for y in (low, high))
                line = f"M{middle:.1f} {low:.1f}V{high:.1f}{tips}"
                parts.append(f'<path class="interval" d="{line}"/>')
        middle = LEFT + room * (place + 0.5)
        parts.append(text(middle, HEIGHT - BOTTOM + 15, label))
        parts.append(text(middle, HEIGHT - BOTTOM + 28, below, kind="small"))
    return drawing(parts, description)
