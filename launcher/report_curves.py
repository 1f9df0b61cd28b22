"""Curves as inline SVG, without a library: lines, grid, axes, a legend with the newest values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 260  # user units; the page scales them
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 12, 40
MOST_POINTS = 500  # of a line; a longer one is thinned evenly
MARKED_POINTS = 40  # a line of no more than these gets marks, whose values show under the pointer

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Axis:
    """A range of values on a stretch of the picture."""

    low: float
    high: float
    start: float  # where `low` is drawn
    end: float

    def place(self, value: float) -> float:
        """Where a value is drawn."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Some five round values."""
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def draw_chart(title: str, lines: Sequence[Line], x_label: str) -> str:
    """An SVG element. Values that are not finite leave a gap."""
    lines = [Line(line.name, thin(line.points)) for line in lines]
    finite = [point for line in lines for point in line.points if math.isfinite(point[1])]
    if not finite:
        return ""
    xs, ys = [x for x, _ in finite], [y for _, y in finite]
    x_axis = Axis(*_padded(min(xs), max(xs), 0), LEFT, WIDTH - RIGHT)
    y_axis = Axis(*_padded(min(ys), max(ys), 0.06), HEIGHT - BOTTOM, TOP)
    drawn = [_draw_line(line, place, x_axis, y_axis) for place, line in enumerate(lines)]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by {escape(x_label)}">'
        f"{_grid(x_axis, y_axis)}{''.join(drawn)}"
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">'
        f"{escape(x_label)}</text></svg>"
    )


def thin(points: Sequence[Point]) -> list[Point]:
    """At most `MOST_POINTS`, evenly, the last one always among them."""
    step = max(1, math.ceil(len(points) / MOST_POINTS))
    return list(points[::-1][::step][::-1])


def short(value: float) -> str:
    """A number for an axis: 1.5M, 20k, 0.25, 2e-05."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _round_step(step: float) -> float:
    scale = 10.0 ** math.floor(math.log10(step))
    return min((factor * scale for factor in (1, 2, 5, 10)), key=lambda near: abs(math.log(near / step)))


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    margin = (high - low) * share
    if high - low <= 1e-12 * max(abs(high), 1e-300):  # all values alike
        margin = abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _grid(x_axis: Axis, y_axis: Axis) -> str:
    parts = []
    for value in y_axis.ticks():
        y = y_axis.place(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value in x_axis.ticks():
        parts.append(
            f'<text x="{x_axis.place(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{short(value)}</text>'
        )
    y = y_axis.start
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
    return "".join(parts)


def _draw_line(line: Line, place: int, x_axis: Axis, y_axis: Axis) -> str:
    colour = f"c{place % 6}"
    parts = []
    for stretch in _finite_stretches(line.points):
        places = " ".join(f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in stretch)
        parts.append(f'<polyline class="{colour}" points="{places}"/>')
        if len(line.points) <= MARKED_POINTS or len(stretch) == 1:
            parts += [
                f'<circle class="{colour}" cx="{x_axis.place(x):.1f}" cy="{y_axis.place(y):.1f}" r="3">'
                f"<title>{escape(line.name)}: {y:.4g} at {short(x)}</title></circle>"
                for x, y in stretch
            ]
    return "".join(parts)


def _finite_stretches(points: Sequence[Point]) -> list[list[Point]]:
    stretches: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            stretches[-1].append(point)
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]
