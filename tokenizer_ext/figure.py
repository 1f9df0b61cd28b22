"""The figure of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cpt_merge.core.palette import LANGUAGE_COLOURS, MODEL_COLOURS
from cpt_merge.tokenizer_ext.measure import Fertility, Usefulness


def draw(fertility: Sequence[Fertility], usefulness: Sequence[Usefulness], path: Path) -> None:
    """Left: tokens per character before and after. Right: what each further piece brings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained", dpi=150)
    bars, curves = figure.subplots(1, 2)
    languages = [one.language for one in fertility]
    kinds = ((-0.2, "base", MODEL_COLOURS["base"]), (0.2, "extended", MODEL_COLOURS["cpt"]))
    for which, (offset, label, colour) in enumerate(kinds):
        values = [one.tokens_per_character[which] for one in fertility]
        drawn = bars.bar(
            [place + offset for place in range(len(languages))],
            values,
            0.38,
            label=label,
            color=colour,
        )
        bars.bar_label(drawn, fmt="%.2f", fontsize=8)
    bars.set_xticks(range(len(languages)), languages)
    bars.set_ylabel("tokens per character")
    bars.set_title("Held-out text")
    bars.margins(y=0.2)
    bars.legend(frameon=False, loc="upper right", ncols=2)
    coloured = list(dict.fromkeys([*languages, *(one.language for one in usefulness)]))
    for one in usefulness:
        sizes, gained = [size for size, _ in one.curve], [value for _, value in one.curve]
        colour = LANGUAGE_COLOURS[coloured.index(one.language) % len(LANGUAGE_COLOURS)]
        curves.plot(sizes, gained, marker="o", markersize=3, label=one.language, color=colour)
        if one.curve and one.characters:
            height = dict(one.curve)[one.characters]
            curves.plot(one.characters, height, "o", markersize=9, fillstyle="none", color=colour)
    curves.set_ylim(bottom=0)
    curves.set_xlabel("new pieces")
    curves.set_ylabel("tokens per character")
    curves.set_title("What each further piece brings")
    if any(one.characters for one in usefulness):
        curves.plot(
            [],
            [],
            "o",
            markersize=9,
            fillstyle="none",
            color="gray",
            label="end of single characters",
        )
    curves.legend(frameon=False)
    for axes in (bars, curves):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
