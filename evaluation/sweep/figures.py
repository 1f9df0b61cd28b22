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
from cpt_merge.evaluation.figures import tidy
from cpt_merge.evaluation.sweep.points import Point

TITLES = {
    "chat": "chat: all of the three",
    "in_language": "in the language asked for",
    BITS: "held-out text",
}


def draw_curves(
    points: Sequence[Point], shown: Mapping[str, bool], recommended: float | None, path: Path
) -> Path | None:
    """A panel for each metric of `shown` (name -> whether it is a share), a line per language.

    `points` have one ratio each; the `recommended` one is marked. Returns None if nothing was
    measured.
    """
    points = sorted(points, key=lambda point: point.ratio or 0.0)
    languages = list(dict.fromkeys(language for point in points for language in point.metrics))
    measured = {name for point in points for found in point.metrics.values() for name in found}
    panels = [name for name in shown if name in measured]
    if not panels:
        return None
    figure = Figure(figsize=(3.9 * len(panels), 3.9), layout="constrained")
    handles: dict[str, Any] = {}
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        for number, language in enumerate(languages):
            _line(axes, points, name, language, LANGUAGE_COLOURS[number % len(LANGUAGE_COLOURS)])
        if recommended is not None:
            axes.axvline(recommended, color="#444444", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.set_title(TITLES.get(name, name.replace("_", " ")), loc="left", fontweight="bold")
        axes.set_xlabel("ratio of the chat vector")
        if shown[name]:
            axes.set_ylim(-0.03, 1.06)
            axes.yaxis.set_major_formatter("{x:.0%}")
        if name == BITS:
            axes.set_ylabel("bits per byte (lower is better)")
        tidy(axes)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(str(label), handle)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles),
        frameon=False,
    )  # fmt: skip
    if recommended is not None:
        figure.axes[0].annotate(
            f"{recommended:g}", (recommended, 1), (3, -2), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="left", va="top", fontsize=8, color="#444444",
        )  # fmt: skip
    figure.savefig(path, dpi=150, facecolor="white")
    return path


def _line(axes: Any, points: Sequence[Point], name: str, language: str, colour: str) -> None:
    found = [
        (point.ratio, point.metrics[language][name])
        for point in points
        if name in point.metrics.get(language, {})
    ]
    if not found:
        return
    ratios, values = [ratio for ratio, _ in found], [one.value for _, one in found]
    if name != BITS:  # its interval is how documents differ: equal at every ratio, and wide
        low, high = ([getattr(one, end) for _, one in found] for end in ("low", "high"))
        axes.fill_between(ratios, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(ratios, values, color=colour, marker="o", markersize=3.5, label=language)
