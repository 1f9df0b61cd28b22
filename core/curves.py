"""Curves as inline SVG without library or script: lines, grid, axes, values under the pointer."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 520, 240  # user units; the page scales them
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 40
MOST_POINTS = 500  # of a curve; of a longer one the extremes are kept
MARKED_POINTS = 40  # a curve with at most these points gets marks
HOVERED = 60  # places along the x axis at which the values are displayed under the pointer
LOG_RATIO = 12  # ratio of the largest to the smallest value from which an axis may be logarithmic

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One curve of a chart. `colour` is a class of the page's style sheet."""

    name: str
    points: Sequence[Point]
    colour: str = "k-n0"
    dashed: bool = False


@dataclass(frozen=True)
class ChartForm:
    """How a chart is drawn."""

    x_label: str
    from_zero: bool = False  # the y axis
    may_be_log: bool = False  # the y axis, if the values are far apart
    share: bool = False  # values are parts of one, displayed in percent
    categories: Sequence[str] = ()  # names of x = 0, 1, ...
    mark: float | None = None  # where on the x axis there is a vertical line
    include: Sequence[float] = ()  # values that the y axis reaches in any case


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
        """About five round values."""
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1, 2, 5) if len(decades) <= 4 else (1,)
            ticks = [factor * 10.0**decade for decade in decades for factor in factors]
            within = [tick for tick in ticks if self.low <= tick <= self.high]
            return within[:: math.ceil(len(within) / 8)]
        exact = (self.high - self.low) / 5
        scale = 10.0 ** math.floor(math.log10(exact))
        step = min((f * scale for f in (1, 2, 5, 10)), key=lambda near: abs(math.log(near / exact)))
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def draw_curves(title: str, curves: Sequence[Curve], form: ChartForm) -> str:
    """An SVG element, empty if no value is finite. Other values leave a gap and a mark."""
    curves = [replace(curve, points=thin(curve.points)) for curve in curves]
    finite = [y for curve in curves for _, y in curve.points if math.isfinite(y)]
    if not finite:
        return ""
    xs = [x for curve in curves for x, _ in curve.points]
    margin = 0.04 if form.categories else 0
    x_axis = Axis(*_padded(min(xs), max(xs), margin), LEFT, WIDTH - RIGHT)
    y_axis = _y_axis([*finite, *form.include], form)
    text = percent if form.share else short
    label = escape(form.x_label)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by {label}">',
        grid(y_axis, WIDTH - RIGHT, text),
        _x_ticks(x_axis, form),
        *(_draw(curve, x_axis, y_axis, mark_gaps=not form.categories) for curve in curves),
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" '
        f'text-anchor="middle">{label}</text>',
        _hover(curves, x_axis, form, text),
        "</svg>",
    ]
    return "".join(parts)


def is_logarithmic(curves: Sequence[Curve], form: ChartForm) -> bool:
    """Whether `draw_curves` takes a logarithmic y axis."""
    finite = [y for curve in curves for _, y in curve.points if math.isfinite(y)]
    return bool(finite) and _y_axis(finite, form).logarithmic


def _y_axis(values: Sequence[float], form: ChartForm) -> Axis:
    """The y axis with room for all values; logarithmic if allowed and they are far apart."""
    low, high, bottom = min(values), max(values), HEIGHT - BOTTOM
    if form.may_be_log and low > 0 and high / low >= LOG_RATIO:
        return Axis(low / 1.15, high * 1.15, bottom, TOP, logarithmic=True)
    if form.from_zero and low >= 0:
        return Axis(0.0, high * 1.08 or 1.0, bottom, TOP)
    return Axis(*_padded(low, high, 0.06), bottom, TOP)


def _padded(low: float, high: float, share: float) -> tuple[float, float]:
    margin = (high - low) * share
    if high - low <= 1e-12 * max(abs(high), 1e-300):  # all values are equal
        margin = abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def thin(points: Sequence[Point]) -> list[Point]:
    """At most `MOST_POINTS`: of each stretch the lowest, the highest and one that is not finite.

    A spike or a NaN of a single step so remains visible. The last point is always kept.
    """
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil(len(points) / (MOST_POINTS // 3 - 1))
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        finite = [point for point in stretch if math.isfinite(point[1])]
        chosen = [point for point in stretch if not math.isfinite(point[1])][:1]
        if finite:
            chosen += [min(finite, key=lambda one: one[1]), max(finite, key=lambda one: one[1])]
        kept += sorted(dict.fromkeys(chosen), key=lambda one: one[0])
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


def grid(y_axis: Axis, right: float, text: Callable[[float], str]) -> str:
    """Horizontal lines with their values, and the x axis."""
    parts = []
    for value in y_axis.ticks():
        y = y_axis.place(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text(value)}</text>')
    y = y_axis.start
    return "".join([*parts, f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>'])


def _x_ticks(axis: Axis, form: ChartForm) -> str:
    """Marks and names along the x axis, and the vertical line if there is one."""
    if form.categories:
        step = math.ceil(len(form.categories) / 16)
        ticks = [(float(x), name) for x, name in enumerate(form.categories) if x % step == 0]
    else:
        ticks = [(x, short(x)) for x in axis.ticks()]
    y, parts = HEIGHT - BOTTOM, []
    for value, name in ticks:
        x = f"{axis.place(value):.1f}"
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{y}" y2="{y + 4}"/>')
        parts.append(f'<text x="{x}" y="{y + 16}" text-anchor="middle">{escape(name)}</text>')
    if form.mark is not None and axis.low <= form.mark <= axis.high:
        x = f"{axis.place(form.mark):.1f}"
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{TOP}" y2="{y}"/>')
    return "".join(parts)


def _draw(curve: Curve, x_axis: Axis, y_axis: Axis, mark_gaps: bool) -> str:
    kind = f"{curve.colour} dashed" if curve.dashed else curve.colour
    stretches: list[list[str]] = [[]]  # the points between two gaps, as "x,y"
    parts, y = [], y_axis.start
    for x, value in curve.points:
        if math.isfinite(value):
            stretches[-1].append(f"{x_axis.place(x):.1f},{y_axis.place(value):.1f}")
            continue
        stretches.append([])
        if mark_gaps:
            at = f"{x_axis.place(x):.1f}"
            parts.append(f'<line class="odd" x1="{at}" x2="{at}" y1="{y}" y2="{y - 7}"/>')
    has_marks = len(curve.points) <= MARKED_POINTS and not curve.dashed
    for stretch in filter(None, stretches):
        parts.append(f'<polyline class="{kind}" points="{" ".join(stretch)}"/>')
        if has_marks or len(stretch) == 1:
            for at, _, height in (point.partition(",") for point in stretch):
                parts.append(f'<circle class="{curve.colour}" cx="{at}" cy="{height}" r="3"/>')
    return "".join(parts)


def _hover(
    curves: Sequence[Curve], axis: Axis, form: ChartForm, text: Callable[[float], str]
) -> str:
    """Strips over the whole height; the title of each contains the value of every curve there."""
    xs = sorted({x for curve in curves for x, _ in curve.points if not (form.categories and x % 1)})
    xs = xs[:: math.ceil(len(xs) / HOVERED)]
    places = [axis.place(x) for x in xs]
    edges = [LEFT, *((a + b) / 2 for a, b in pairwise(places)), WIDTH - RIGHT]
    strips, height = [], HEIGHT - BOTTOM - TOP
    for x, left, right in zip(xs, edges, edges[1:], strict=False):
        at = form.categories[int(x)] if form.categories else f"{form.x_label} {short(x)}"
        shown = [
            at,
            *(f"{one.name}: {text(_value_at(one.points, x))}" for one in curves if one.points),
        ]
        strips.append(
            f'<rect class="hover" x="{left:.1f}" width="{right - left:.1f}" y="{TOP}" '
            f'height="{height}"><title>{escape(chr(10).join(shown))}</title></rect>'
        )
    return "".join(strips)


def _value_at(points: Sequence[Point], x: float) -> float:
    """The value at x, or at the nearest point."""
    place = bisect_left(points, (x, -math.inf))
    near = [points[other] for other in (place - 1, place) if 0 <= other < len(points)]
    return min(near, key=lambda point: abs(point[0] - x))[1]
