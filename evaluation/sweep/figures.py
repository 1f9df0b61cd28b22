"""The curves of a sweep, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib.figure import Figure

from cpt_merge.core.palette import LANGUAGE_COLOURS
from cpt_merge.evaluation.evaluators.language import BITS
from cpt_merge.evaluation.sweep.points import Point

TITLES = {
    "chat": "chat: all of the three",
    "in_language": "in the language asked for",
    BITS: "held-out text",
}


def draw_curves(
    points: Sequence[Point], shown: Mapping[str, bool], recommended: float | None, path: Path
) -> Path | None:
    """A panel for each metric of `shown` (name -> whether it is a share), a line for each language.

    Shares are drawn with their intervals. `points` have one ratio each, `recommended` is marked.
    None if nothing was measured.
    """
    points = sorted(points, key=lambda point: point.ratio or 0.0)
    languages = list(dict.fromkeys(language for point in points for language in point.figures))
    panels = [
        name
        for name in shown
        if any(name in found for point in points for found in point.figures.values())
    ]
    if not panels:
        return None
    figure = Figure(figsize=(3.9 * len(panels), 3.9), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        for number, language in enumerate(languages):
            _line(axes, points, name, language, LANGUAGE_COLOURS[number % len(LANGUAGE_COLOURS)])
        if recommended is not None:
            axes.axvline(recommended, color="#444444", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.set_title(TITLES.get(name, name.replace("_", " ")), loc="left", fontweight="bold")
        axes.set_xlabel("ratio of the chat vector")
        _axis(axes, name, shown[name])
    handles, names = _legend(figure)
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    if recommended is not None:
        figure.axes[0].annotate(
            f"{recommended:g}", (recommended, 1), (3, -2), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="left", va="top", fontsize=8, color="#444444",
        )  # fmt: skip
    figure.savefig(path, dpi=150, facecolor="white")
    return path


def _line(axes: Any, points: Sequence[Point], name: str, language: str, colour: str) -> None:
    found = [
        (point.ratio, point.figures[language][name])
        for point in points
        if name in point.figures.get(language, {})
    ]
    if not found:
        return
    ratios = [ratio for ratio, _ in found]
    if (
        name != BITS
    ):  # whose interval says how documents differ, which is the same at every ratio and hides the curve
        low, high = ([getattr(one, end) for _, one in found] for end in ("low", "high"))
        axes.fill_between(ratios, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(
        ratios,
        [one.value for _, one in found],
        color=colour,
        marker="o",
        markersize=3.5,
        label=language,
    )


def _axis(axes: Any, name: str, share: bool) -> None:
    if share:
        axes.set_ylim(-0.03, 1.06)
        axes.yaxis.set_major_formatter("{x:.0%}")
    if name == BITS:
        axes.set_ylabel("bits per byte (lower is better)")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _legend(figure: Figure) -> tuple[list[Any], list[str]]:
    """Of all panels, each language once."""
    found = dict[str, Any]()
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(str(name), handle)
    return list(found.values()), list(found)
