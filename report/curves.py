"""Curves as inline SVG, without a library or a script: lines, grid, axes, and the values under the pointer."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 520, 240  # user units; the page scales them
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 40
MOST_POINTS = 500  # of a line; of a longer one the extremes are kept
MARKED_POINTS = 40  # a line of no more than these gets marks
HOVERED = 60  # places along the x axis at which the values show under the pointer
LOG_RATIO = 12  # largest to smallest value from which an axis may be logarithmic

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart. `colour` is a class of the page's style sheet."""

    name: str
    points: Sequence[Point]
    colour: str = "k-n0"
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """A range of values on a stretch of the picture."""

    low: float
    high: float
    start: float  # where `low` is drawn
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where a value is drawn."""
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Some five round values."""
        if self.logarithmic:
            return self._log_ticks()
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _log_ticks(self) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors = (1, 2, 5) if len(decades) <= 4 else (1,)
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        within = [tick for tick in ticks if self.low <= tick <= self.high]
        return within[:: math.ceil(len(within) / 8)]


@dataclass(frozen=True)
class Form:
    """How a chart is drawn."""

    x_label: str
    from_zero: bool = False  # of the y axis
    may_be_log: bool = False  # of the y axis, where values lie far apart
    share: bool = False  # values are parts of one, shown in percent
    categories: Sequence[str] = ()  # names of x = 0, 1, ...
    mark: float | None = None  # a place on the x axis that a line stands at


def draw_chart(title: str, lines: Sequence[Line], form: Form) -> str:
    """An SVG element. Values that are not finite leave a gap and a mark; with none that is finite there is no chart."""
    lines = [Line(line.name, thin(line.points), line.colour, line.dashed) for line in lines]
    finite = [point for line in lines for point in line.points if math.isfinite(point[1])]
    if not finite:
        return ""
    xs, ys = [x for line in lines for x, _ in line.points], [y for _, y in finite]
    x_axis = Axis(*_padded(min(xs), max(xs), 0.04 if form.categories else 0), LEFT, WIDTH - RIGHT)
    y_axis = y_axis_of(ys, form)
    form_y: Callable[[float], str] = percent if form.share else short
    drawn = [_draw_line(line, x_axis, y_axis, not form.categories) for line in lines]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by {escape(form.x_label)}">'
        f"{grid(y_axis, WIDTH - RIGHT, form_y)}{_x_ticks(x_axis, form)}{_mark(x_axis, form.mark)}{''.join(drawn)}"
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">'
        f"{escape(form.x_label)}</text>{_hover(lines, x_axis, form, form_y)}</svg>"
    )


def y_axis_of(values: Sequence[float], form: Form, height: float = HEIGHT) -> Axis:
    """The y axis that holds all values. Logarithmic if it may be and they are positive and far apart."""
    low, high = min(values), max(values)
    if form.may_be_log and low > 0 and high / low >= LOG_RATIO:
        return Axis(low / 1.15, high * 1.15, height - BOTTOM, TOP, logarithmic=True)
    if form.from_zero and low >= 0:
        return Axis(0.0, high * 1.08 or 1.0, height - BOTTOM, TOP)
    return Axis(*_padded(low, high, 0.06), height - BOTTOM, TOP)


def is_logarithmic(lines: Sequence[Line], form: Form) -> bool:
    """Whether `draw_chart` takes a logarithmic y axis."""
    finite = [y for line in lines for _, y in line.points if math.isfinite(y)]
    return bool(finite) and y_axis_of(finite, form).logarithmic


def thin(points: Sequence[Point]) -> list[Point]:
    """At most `MOST_POINTS`: of each stretch the lowest and the highest value, and one that is not finite.

    A spike or a NaN of a single step so remains to be seen. The last point is always kept.
    """
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil(len(points) / (MOST_POINTS // 3 - 1))
    kept = []
    for start in range(0, len(points), size):
        places = range(start, min(start + size, len(points)))
        finite = [place for place in places if math.isfinite(points[place][1])]
        chosen = (
            {next((place for place in places if place not in finite), places[0])}
            if len(finite) < size
            else set()
        )
        if finite:
            chosen |= {
                min(finite, key=lambda place: points[place][1]),
                max(finite, key=lambda place: points[place][1]),
            }
        kept += [points[place] for place in sorted(chosen)]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def short(value: float) -> str:
    """A number for an axis: 1.5M, 20k, 0.25, 2e-05."""
    if abs(value) >= 1e12:
        return f"{value:.3g}"
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def percent(value: float) -> str:
    """A share for an axis."""
    return f"{100 * value:.3g} %"


def grid(y_axis: Axis, right: float, form: Callable[[float], str]) -> str:
    """Horizontal lines with their values, and the x axis."""
    parts = []
    for value in y_axis.ticks():
        y = y_axis.place(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{form(value)}</text>')
    y = y_axis.start
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
    return "".join(parts)


def _x_ticks(axis: Axis, form: Form) -> str:
    if form.categories:
        step = math.ceil(len(form.categories) / 16)
        shown = [
            (float(place), name) for place, name in enumerate(form.categories) if place % step == 0
        ]
    else:
        shown = [(value, short(value)) for value in axis.ticks()]
    y = HEIGHT - BOTTOM
    return "".join(
        f'<line class="axis" x1="{axis.place(value):.1f}" x2="{axis.place(value):.1f}" y1="{y}" y2="{y + 4}"/>'
        f'<text x="{axis.place(value):.1f}" y="{y + 16}" text-anchor="middle">{escape(name)}</text>'
        for value, name in shown
    )


def _mark(axis: Axis, value: float | None) -> str:
    if value is None or not axis.low <= value <= axis.high:
        return ""
    x = axis.place(value)
    return f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'


def _round_step(step: float) -> float:
    scale = 10.0 ** math.floor(math.log10(step))
    return min(
        (factor * scale for factor in (1, 2, 5, 10)), key=lambda near: abs(math.log(near / step))
    )


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    margin = (high - low) * share
    if high - low <= 1e-12 * max(abs(high), 1e-300):  # all values alike
        margin = abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _draw_line(line: Line, x_axis: Axis, y_axis: Axis, marked_gaps: bool) -> str:
    kind = f"{line.colour} dashed" if line.dashed else line.colour
    parts = []
    for stretch in _finite_stretches(line.points):
        places = " ".join(f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in stretch)
        parts.append(f'<polyline class="{kind}" points="{places}"/>')
        if (len(line.points) <= MARKED_POINTS and not line.dashed) or len(stretch) == 1:
            parts += [
                f'<circle class="{line.colour}" cx="{x_axis.place(x):.1f}" cy="{y_axis.place(y):.1f}" r="3"/>'
                for x, y in stretch
            ]
    y = y_axis.start
    odd = [x_axis.place(x) for x, value in line.points if marked_gaps and not math.isfinite(value)]
    parts += [f'<line class="odd" x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y - 7}"/>' for x in odd]
    return "".join(parts)


def _finite_stretches(points: Sequence[Point]) -> list[list[Point]]:
    stretches: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            stretches[-1].append(point)
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def _hover(lines: Sequence[Line], axis: Axis, form: Form, form_y: Callable[[float], str]) -> str:
    """Strips over the whole height, whose titles say what every line is there."""
    xs = sorted({x for line in lines for x, y in line.points if not (form.categories and x % 1)})
    xs = xs[:: math.ceil(len(xs) / HOVERED)]
    places = [axis.place(x) for x in xs]
    edges = [LEFT, *((a + b) / 2 for a, b in pairwise(places)), WIDTH - RIGHT]
    strips = []
    for number, x in enumerate(xs):
        at = form.categories[int(x)] if form.categories else f"{form.x_label} {short(x)}"
        values = [
            f"{line.name}: {form_y(value)}"
            for line in lines
            if (value := _value_at(line.points, x)) is not None
        ]
        left, right = edges[number], edges[number + 1]
        strips.append(
            f'<rect class="hover" x="{left:.1f}" width="{right - left:.1f}" y="{TOP}" height="{HEIGHT - BOTTOM - TOP}">'
            f"<title>{escape(chr(10).join([at, *values]))}</title></rect>"
        )
    return "".join(strips)


def _value_at(points: Sequence[Point], x: float) -> float | None:
    """The value at x, or at the nearest point there is."""
    place = bisect_left(points, (x, -math.inf))
    near = [points[other] for other in (place - 1, place) if 0 <= other < len(points)]
    return min(near, key=lambda point: abs(point[0] - x))[1] if near else None
