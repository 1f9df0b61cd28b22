"""The report of an extension: tables on the terminal, `report.json`, a picture, and all of it for
the tracker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from cpt_merge.core.artifact import write_json
from cpt_merge.core.palette import LANGUAGE_COLOURS, MODEL_COLOURS
from cpt_merge.core.progress import console, say
from cpt_merge.tokenizer_ext.fertility import (
    Example,
    Fertility,
    Usefulness,
    measure_fertility,
    measure_usefulness,
    split_examples,
)
from cpt_merge.tokenizer_ext.learn.grow import Learned
from cpt_merge.tokenizer_ext.verify.invariants import Case, Proof
from cpt_merge.tracking import Tracker

REPORT_FILE = "report.json"
FIGURE_FILE = "report.png"


@dataclass(frozen=True)
class Report:
    """Everything that the report shows."""

    fertility: list[Fertility]  # of the corpus' languages
    drift: list[Fertility]  # of languages without new pieces, which may share a script with another
    usefulness: list[Usefulness]
    examples: list[Example]
    proofs: list[Proof]


def make_report(
    case: Case, learned: Sequence[Learned], asked: Mapping[str, int], proofs: list[Proof]
) -> Report:
    """Measure on the held-out documents and on a few sentences of other languages."""
    samples = case.samples
    measured = {
        name: measure_fertility(case, name, texts) for name, texts in samples.texts.items() if texts
    }
    languages = [one.language for one in learned]
    drift = [one for name, one in measured.items() if name not in languages]
    drift += [
        measure_fertility(case, f"{name} (sentences)", texts)
        for name, texts in samples.sentences.items()
    ]
    usefulness = []
    for number, one in enumerate(learned):
        later = {
            piece: halves
            for other in learned[number + 1 :]
            for piece, halves in other.pieces.items()
        }
        sized = asked.get(one.language, len(one.pieces))
        usefulness.append(measure_usefulness(case, one, later, sized, measured))
    for useful in usefulness:
        if not useful.curve:
            say(
                f"{useful.language}: no document is held out, so there is no gain curve; raise "
                "corpus.heldout"
            )
    examples = [
        example for name in languages for example in split_examples(case, name, samples.texts[name])
    ]
    return Report(list(measured.values()), drift, usefulness, examples, proofs)


def publish(report: Report, out: Path, tracker: Tracker) -> None:
    """Write `report.json` and `report.png`, print the tables, and log everything."""
    content = asdict(report)
    for one in (*content["fertility"], *content["drift"]):
        del one["tokens"]
    write_json(out / REPORT_FILE, content)
    draw(report.fertility, report.usefulness, out / FIGURE_FILE)
    for name, columns, rows in tables(report):
        show(name, columns, rows)
        tracker.table(f"tokenizer/{name}", columns, rows)
    tracker.curves(
        "tokenizer/gain curve", ["language", "new pieces", "tok/char"], curve_rows(report)
    )
    tracker.image("tokenizer/report", out / FIGURE_FILE)
    tracker.file(f"tokenizer-{REPORT_FILE}", out / REPORT_FILE)


Rows = list[list[Any]]


def tables(report: Report) -> list[tuple[str, list[str], Rows]]:
    """Name, columns and rows of every printed table."""
    pieces = [
        [
            one.language, one.asked, one.found, one.characters, one.given, one.pruned,
            _round(one.used_in_training), _round(one.used_in_heldout),
        ]
        for one in report.usefulness
    ]  # fmt: skip
    examples = [[one.language, one.before, one.after] for one in report.examples]
    counts = ["asked for", "found", "characters", "from list", "pruned"]
    return [
        ("fertility", FERTILITY_COLUMNS, fertility_rows(report.fertility)),
        ("pieces", ["language", *counts, "used in training text", "used in held-out text"], pieces),
        ("drift", FERTILITY_COLUMNS, fertility_rows(report.drift)),
        ("examples", ["language", "before", "after"], examples),
        ("proofs", PROOF_COLUMNS, proof_rows(report.proofs)),
    ]


FERTILITY_COLUMNS = [
    "language",
    "texts",
    "tok/char base",
    "tok/char new",
    "bytes/tok base",
    "bytes/tok new",
    "changed",
]
PROOF_COLUMNS = ["invariant", "checked", "broken"]


def fertility_rows(fertility: Sequence[Fertility]) -> Rows:
    """One row per language."""
    return [
        [
            one.language,
            one.documents,
            *map(_round, (*one.tokens_per_character, *one.bytes_per_token, one.changed)),
        ]
        for one in fertility
    ]


def proof_rows(proofs: Sequence[Proof]) -> Rows:
    """One row per invariant."""
    return [[proof.invariant, proof.checked, len(proof.failures)] for proof in proofs]


def curve_rows(report: Report) -> Rows:
    """The points of all gain curves."""
    return [
        [one.language, size, _round(value)]
        for one in report.usefulness
        for size, value in one.curve
    ]


def _round(value: float) -> float:
    return round(value, 4)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table."""
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1)
    )
    for number, column in enumerate(columns):
        numeric = bool(rows) and isinstance(rows[0][number], int | float)
        table.add_column(Text(column), overflow="fold", justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console.print(table)


def draw(fertility: Sequence[Fertility], usefulness: Sequence[Usefulness], path: Path) -> None:
    """Draw tokens per character before and after (left), and the gain of each further piece
    (right).
    """
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
