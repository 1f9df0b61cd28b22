"""Bars as inline SVG: a group for each language, a bar with its interval for each model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from cpt_merge.core.curves import BOTTOM, LEFT, RIGHT, TOP, Axis, grid, percent, short
from cpt_merge.tracking import Cell

NARROW, WIDE = (380, 210), (520, 240)  # user units: in a grid of three columns, and of two
HEADROOM = 1.1  # of the axis, over the highest bar
LABELLED = 16  # with more bars than these, the values are displayed only under the pointer


@dataclass(frozen=True)
class Bar:
    """A value and its interval; low = high = value if there is none."""

    value: float
    low: float
    high: float

    @staticmethod
    def exact(value: Cell) -> Bar:
        """A value without an interval."""
        return Bar(*[float(value or 0)] * 3)


@dataclass(frozen=True)
class BarSeries:
    """The bars of one model: one for each group, None where it was not measured."""

    name: str
    bars: Sequence[Bar | None]
    colour: str  # a class of the page's style sheet


def draw_bars(
    title: str,
    groups: Sequence[str],
    series: Sequence[BarSeries],
    share: bool = False,
    size: tuple[int, int] = NARROW,
    clip: float = math.inf,
) -> str:
    """An SVG element. With `share`, values are parts of one.

    Values have to be finite and not negative. Bars above `clip` are cut off there, with a gap.
    """
    total_width, height = size
    known = [bar for one in series for bar in one.bars if bar]
    if not known:
        return ""
    highest = 1.0 if share else min(max(bar.high for bar in known), clip) or 1.0
    y_axis = Axis(0.0, highest * HEADROOM, height - BOTTOM + 12, TOP)
    room = (total_width - RIGHT - LEFT) / len(groups)
    width = room * 0.84 / len(series)
    labelled = len(groups) * len(series) <= LABELLED
    parts = [
        f'<svg viewBox="0 0 {total_width} {height}" role="img" aria-label="{escape(title)}">',
        grid(y_axis, total_width - RIGHT, percent if share else short),
    ]
    for number, one in enumerate(series):
        for place, (group, bar) in enumerate(zip(groups, one.bars, strict=True)):
            if bar:
                left = LEFT + (place + 0.08) * room + number * width
                words = escape(f"{one.name}, {group}: {_text(bar, share)}")
                parts.append(_draw(bar, left, width, y_axis, one.colour, words))
                if labelled:
                    parts.append(_label(bar, left + width / 2, y_axis, share))
    for place, group in enumerate(groups):
        x = f"{LEFT + (place + 0.5) * room:.1f}"
        parts.append(f'<text x="{x}" y="{height - 10}" text-anchor="middle">{escape(group)}</text>')
    return "".join([*parts, "</svg>"])


def _text(bar: Bar, share: bool) -> str:
    """The value with its interval, for display under the pointer."""
    text = percent if share else short
    interval = f" ({text(bar.low)} to {text(bar.high)})" if bar.low < bar.high else ""
    return f"{text(bar.value)}{interval}"


def _draw(bar: Bar, left: float, width: float, y_axis: Axis, colour: str, title: str) -> str:
    highest = y_axis.high / HEADROOM
    if bar.value > highest:
        top, size = y_axis.place(highest), y_axis.start - y_axis.place(highest)
        return (
            f'<rect class="{colour}" x="{left:.1f}" y="{top:.1f}" width="{width * 0.92:.1f}" '
            f'height="{size:.1f}"><title>{title}</title></rect><rect class="gap" x="{left:.1f}" '
            f'y="{top + 8:.1f}" width="{width * 0.92:.1f}" height="3"/>'
        )
    bar = replace(bar, low=max(bar.low, 0.0), high=min(bar.high, highest))
    top, middle = y_axis.place(bar.value), f"{left + width / 2:.1f}"
    drawn = (
        f'<rect class="{colour}" x="{left:.1f}" y="{top:.1f}" width="{width * 0.92:.1f}" '
        f'height="{max(y_axis.start - top, 0.8):.1f}"><title>{title}</title></rect>'
    )
    if bar.low < bar.high:
        low, high = y_axis.place(bar.low), y_axis.place(bar.high)
        drawn += (
            f'<line class="interval" x1="{middle}" x2="{middle}" y1="{low:.1f}" y2="{high:.1f}"/>'
        )
    return drawn


def _label(bar: Bar, x: float, y_axis: Axis, share: bool) -> str:
    digits = 2 if bar.value < 10 else 1
    text = f"{100 * bar.value:.0f}" if share else f"{bar.value:.{digits}f}"
    highest = y_axis.high / HEADROOM
    y = y_axis.place(min(max(bar.value, bar.high), highest)) - 3
    return f'<text class="value" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{text}</text>'
