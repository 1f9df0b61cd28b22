"""Figures of an evaluation, as PNG. Languages appear as tags: a Chinese font may be missing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from cpt_merge.core.palette import FURTHER_COLOURS, MODEL_COLOURS
from cpt_merge.evaluation.evaluators.language import BITS
from cpt_merge.evaluation.results import Scores, languages_with

PANELS = {  # figure -> its four panels: metric -> title
    "replies": {
        "chat": "chat: all of the three",
        "stopped": "stops by itself",
        "in_language": "in the language asked for",
        "keeps_format": "keeps the format",
    },
    "tasks": {
        "instructions": "prompts passed",
        "instruction_checks": "checks passed",
        "dialogues": "dialogues passed",
        "dialogue_turns": "turns passed",
    },
}


def figures_for(metrics: Collection[str]) -> list[str]:
    """The names of the figures that can be drawn from these metrics."""
    bits = ["bits_per_byte"] if BITS in metrics else []
    return [*bits, *(name for name, panels in PANELS.items() if set(panels) <= set(metrics))]


def draw_bits_per_byte(scores: Scores, path: Path) -> Path:
    """Bars of bits per byte by language and model, with their intervals."""
    languages = languages_with(scores, BITS)
    width = max(5.0, 1.2 + 0.55 * len(scores) * len(languages))
    figure = Figure(figsize=(width, 3.8), layout="constrained")
    axes = figure.subplots()
    _bars(axes, scores, BITS, languages, "{:.2f}")
    axes.set_ylabel("held-out bits per byte (lower is better)")
    axes.set_title("Held-out text", loc="left", fontweight="bold")
    return _save(figure, axes, path)


def draw_shares(scores: Scores, titles: Mapping[str, str], path: Path) -> Path:
    """Shares, one panel for each of four metrics."""
    languages = languages_with(scores, next(iter(titles)))
    width = max(3.4, 0.9 + 0.4 * len(scores) * len(languages))
    layout = ConstrainedLayoutEngine(hspace=0.06, wspace=0.04)
    figure = Figure(figsize=(2 * width, 6.4), layout=layout)
    panels = figure.subplots(2, 2, sharey=True).flat
    for axes, (metric, title) in zip(panels, titles.items(), strict=True):
        _bars(axes, scores, metric, languages, "{:.0%}")
        axes.set_ylim(0, 1.12)
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_title(title, loc="left", fontweight="bold")
    figure.supylabel("share", fontsize="medium")
    return _save(figure, axes, path)


def _colours_of(models: Collection[str]) -> dict[str, str]:
    """A colour for each model: those of a recipe have their own, others get the remaining ones."""
    unused = [colour for name, colour in MODEL_COLOURS.items() if name not in models]
    others = cycle([*FURTHER_COLOURS, *unused])
    return {model: MODEL_COLOURS.get(model) or next(others) for model in models}


def _bars(axes: Any, scores: Scores, metric: str, languages: list[str], label: str) -> None:
    """A group of bars per language, a bar per model with its interval as a line and its value."""
    width, colours = 0.84 / len(scores), _colours_of(scores)
    for number, (model, found) in enumerate(scores.items()):
        shown = [
            (place, found[language][metric])
            for place, language in enumerate(languages)
            if metric in found.get(language, {})
        ]
        places = [place + (number - (len(scores) - 1) / 2) * width for place, _ in shown]
        values = [estimate.value for _, estimate in shown]
        below = [max(estimate.value - estimate.low, 0) for _, estimate in shown]
        above = [max(estimate.high - estimate.value, 0) for _, estimate in shown]
        axes.bar(places, values, width * 0.92, label=model, color=colours[model])
        axes.errorbar(
            places, values, [below, above], fmt="none", ecolor="#333333", elinewidth=0.8, capsize=2
        )
        for x, value, rise in zip(places, values, above, strict=True):
            axes.annotate(
                label.format(value), (x, value + rise), (0, 2), textcoords="offset points",
                ha="center", va="bottom", fontsize=7.5, color="#222222",
            )  # fmt: skip
    axes.set_xticks(range(len(languages)), languages)
    axes.margins(y=0.12)
    tidy(axes)


def tidy(axes: Any) -> None:
    """Horizontal grid lines behind the data, and no frame."""
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _save(figure: Figure, axes: Any, path: Path) -> Path:
    handles, names = axes.get_legend_handles_labels()
    columns = min(len(names), 5)
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=150, facecolor="white")
    return path
