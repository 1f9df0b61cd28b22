"""Groups of bars as inline SVG: a group per language, a bar per model, its 95 % interval as a thin line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from cpt_merge.report.curves import BOTTOM, LEFT, RIGHT, TOP, Axis, grid, percent, short

NARROW, WIDE = (380, 210), (520, 240)  # user units: in a grid of three columns, and of two
LABELLED = 16  # no more bars than these are labelled; the others' values show under the pointer


@dataclass(frozen=True)
class Bar:
    """A value and the interval it lies in; low = high = value where there is none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """The bars of one model: one for each group, None where it was not measured."""

    name: str
    bars: Sequence[Bar | None]
    colour: str  # a class of the page's style sheet


def draw_bars(
    title: str,
    groups: Sequence[str],
    series: Sequence[Series],
    share: bool = False,
    size: tuple[int, int] = NARROW,
) -> str:
    """An SVG element. `share`: values are parts of one. Values are assumed finite and not negative."""
    total_width, height = size
    known = [bar for one in series for bar in one.bars if bar]
    if not known:
        return ""
    highest = 1.0 if share else max(bar.high for bar in known) or 1.0
    y_axis = Axis(0.0, highest * 1.1, height - BOTTOM + 12, TOP)
    form: Callable[[float], str] = percent if share else short
    room = (total_width - RIGHT - LEFT) / len(groups)
    width = room * 0.84 / len(series)
    labelled = len(groups) * len(series) <= LABELLED
    parts = [
        _bar(
            title_of(one.name, group, bar, form),
            bar,
            one.colour,
            left,
            width,
            y_axis,
            labelled,
            share,
        )
        for number, one in enumerate(series)
        for place, (group, bar) in enumerate(zip(groups, one.bars, strict=True))
        if bar and (left := LEFT + (place + 0.08) * room + number * width)
    ]
    names = "".join(
        f'<text x="{LEFT + (place + 0.5) * room:.1f}" y="{height - 10}" text-anchor="middle">{escape(group)}</text>'
        for place, group in enumerate(groups)
    )
    return (
        f'<svg viewBox="0 0 {total_width} {height}" role="img" aria-label="{escape(title)}">'
        f"{grid(y_axis, total_width - RIGHT, form)}{''.join(parts)}{names}</svg>"
    )


def title_of(name: str, group: str, bar: Bar, form: Callable[[float], str]) -> str:
    """What shows under the pointer."""
    interval = f" ({form(bar.low)} to {form(bar.high)})" if bar.low < bar.high else ""
    return f"{name}, {group}: {form(bar.value)}{interval}"


def _bar(
    title: str,
    bar: Bar,
    colour: str,
    left: float,
    width: float,
    y_axis: Axis,
    labelled: bool,
    share: bool,
) -> str:
    top, middle = y_axis.place(bar.value), left + width / 2
    drawn = (
        f'<rect class="{colour}" x="{left:.1f}" y="{top:.1f}" width="{width * 0.92:.1f}" '
        f'height="{max(y_axis.start - top, 0.8):.1f}"><title>{escape(title)}</title></rect>'
    )
    if bar.low < bar.high:
        low, high = y_axis.place(bar.low), y_axis.place(bar.high)
        drawn += f'<line class="interval" x1="{middle:.1f}" x2="{middle:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
    if labelled:
        text = f"{100 * bar.value:.0f}" if share else f"{bar.value:.{2 if bar.value < 10 else 1}f}"
        y = min(top, y_axis.place(bar.high)) - 3
        drawn += (
            f'<text class="value" x="{middle:.1f}" y="{y:.1f}" text-anchor="middle">{text}</text>'
        )
    return drawn
