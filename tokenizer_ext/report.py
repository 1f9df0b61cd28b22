"""The report: tables on the terminal, `report.json`, a figure, and all of it to the tracker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from core.artifact import write_json
from core.progress import console
from tokenizer_ext.figure import draw
from tokenizer_ext.grow import Learned
from tokenizer_ext.measure import (
    Example,
    Fertility,
    Usefulness,
    measure_fertility,
    measure_usefulness,
    split_examples,
)
from tokenizer_ext.verify import Case, Proof

if TYPE_CHECKING:
    from tracking import Tracker

REPORT_FILE = "report.json"
FIGURE_FILE = "report.png"


@dataclass(frozen=True)
class Report:
    """Everything that is shown."""

    fertility: list[Fertility]
    usefulness: list[Usefulness]
    examples: list[Example]
    proofs: list[Proof]


def make_report(case: Case, learned: Sequence[Learned], asked: Mapping[str, int], proofs: list[Proof]) -> Report:
    """Measure on the held-out documents and on what was counted while learning."""
    measured = [measure_fertility(case, language) for language in case.samples.heldout]
    fertility = [one for one in measured if one is not None]
    usefulness = [measure_usefulness(case, one, asked[one.language], fertility) for one in learned]
    examples = [example for one in learned for example in split_examples(case, one.language)]
    return Report(fertility, usefulness, examples, proofs)


def publish(report: Report, out: Path, tracker: Tracker) -> None:
    """Write `report.json` and `report.png`, print the tables, and hand everything to the tracker."""
    content = asdict(report)
    for one in content["fertility"]:
        del one["ids"]
    write_json(out / REPORT_FILE, content)
    draw(report.fertility, report.usefulness, out / FIGURE_FILE)
    for name, columns, rows in tables(report):
        show(name, columns, rows)
        tracker.table(f"tokenizer/{name}", columns, rows)
    tracker.image("tokenizer/report", out / FIGURE_FILE)


def tables(report: Report) -> list[tuple[str, list[str], list[list[Any]]]]:
    """Name, columns and rows of every table."""
    fertility = [
        [one.language, one.documents, *map(_round, (*one.tokens_per_character, *one.bytes_per_token, one.changed))]
        for one in report.fertility
    ]
    pieces = [
        [one.language, one.asked, one.found, one.characters, *map(_round, (one.used_in_training, one.used_in_heldout))]
        for one in report.usefulness
    ]
    examples = [[one.language, one.before, one.after] for one in report.examples]
    proofs = [[one.law, one.checked, len(one.failures)] for one in report.proofs]
    ratios = ["tok/char", "tok/char after", "bytes/tok", "bytes/tok after", "changed"]
    shares = ["used in training text", "used in held-out text"]
    return [
        ("fertility", ["language", "documents", *ratios], fertility),
        ("pieces", ["language", "asked for", "found", "characters", *shares], pieces),
        ("examples", ["language", "before", "after"], examples),
        ("proofs", ["law", "checked", "broken"], proofs),
    ]


def _round(value: float) -> float:
    return round(value, 4)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1))
    for number, column in enumerate(columns):
        numeric = bool(rows) and isinstance(rows[0][number], int | float)
        table.add_column(Text(column), overflow="fold", justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console.print(table)
