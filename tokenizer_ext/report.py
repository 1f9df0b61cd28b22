"""What the extension is worth, in numbers: on the terminal, in `report.json`, in a figure, and to the tracker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from core.artifact import write_json
from core.languages import find_language
from core.progress import console
from tokenizer_ext.base import Base
from tokenizer_ext.grow import Learned
from tokenizer_ext.verify import Case, Proof

if TYPE_CHECKING:
    from tracking import Tracker

REPORT_FILE = "report.json"
FIGURE_FILE = "report.png"
CURVE_POINTS = 12
EXAMPLES = 3
EXAMPLE_LENGTH = 40  # characters


@dataclass(frozen=True)
class Fertility:
    """One language's held-out text before and after."""

    language: str
    documents: int
    characters: int
    tokens_per_character: tuple[float, float]  # with the base, with the extended tokenizer
    bytes_per_token: tuple[float, float]
    changed: float  # share of the documents whose tokens differ


@dataclass(frozen=True)
class Usefulness:
    """One language's new pieces."""

    language: str
    pieces: int
    asked: int
    characters: int  # pieces that are single characters, there for coverage
    used_in_training: float  # share of the pieces that the counted text is spelt with in the end
    used_in_heldout: float
    curve: list[tuple[int, float]]  # number of pieces, tokens per letter of the counted text


@dataclass(frozen=True)
class Example:
    """A held-out text as the two tokenizers split it."""

    language: str
    before: str
    after: str


@dataclass(frozen=True)
class Report:
    """Everything that is shown."""

    fertility: list[Fertility]
    usefulness: list[Usefulness]
    examples: list[Example]
    proofs: list[Proof]


def make_report(case: Case, learned: Sequence[Learned], asked: dict[str, int], proofs: list[Proof]) -> Report:
    """Measure on the held-out documents and on what was counted while learning."""
    fertility: list[Fertility] = []
    seen: set[int] = set()
    for language, texts in case.samples.heldout.items():
        if texts:
            measured, ids = _measure(case, language, texts)
            fertility.append(measured)
            seen |= ids
    ids_by_piece = {piece.piece: piece.id for piece in case.map.new}
    usefulness = [_usefulness(one, asked[one.language], ids_by_piece, seen) for one in learned]
    return Report(fertility, usefulness, _examples(case, [one.language for one in learned]), proofs)


def _measure(case: Case, language: str, texts: list[str]) -> tuple[Fertility, set[int]]:
    before, after = (
        [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        for tokenizer in (case.before, case.after)
    )
    counts = sum(map(len, before)), sum(map(len, after))
    characters = sum(map(len, texts))
    size = sum(len(text.encode()) for text in texts)
    changed = sum(old != new for old, new in zip(before, after, strict=True)) / len(texts)
    per_character = counts[0] / characters, counts[1] / characters
    per_token = size / counts[0], size / counts[1]
    return (
        Fertility(language, len(texts), characters, per_character, per_token, changed),
        {id_ for ids in after for id_ in ids},
    )


def _usefulness(learned: Learned, asked: int, ids: dict[str, int], seen: set[int]) -> Usefulness:
    number = len(learned.pieces)
    remaining = [learned.tokens_before - saved for saved in accumulate(learned.saved, initial=0)]
    points = sorted({round(number * step / CURVE_POINTS) for step in range(CURVE_POINTS + 1)})
    return Usefulness(
        learned.language,
        number,
        asked,
        learned.characters,
        learned.used / max(number, 1),
        sum(ids[piece] in seen for piece in learned.pieces) / max(number, 1),
        [(point, remaining[point] / learned.letters) for point in points],
    )


def _examples(case: Case, languages: Sequence[str]) -> list[Example]:
    found: list[Example] = []
    for language in languages:
        letters = find_language(language).letters
        lines = (line for text in case.samples.heldout[language] for line in text.splitlines())
        fitting = [line for line in lines if EXAMPLE_LENGTH // 4 <= len(line) and letters.search(line[:EXAMPLE_LENGTH])]
        for line in fitting[:: max(1, len(fitting) // EXAMPLES)][:EXAMPLES]:
            text = line[:EXAMPLE_LENGTH]
            found.append(Example(language, _split(case.base, case.before, text), _split(case.base, case.after, text)))
    return found


def _split(base: Base, tokenizer: Any, text: str) -> str:
    tokens = tokenizer.encode(text, add_special_tokens=False).tokens
    return "|".join(base.family.readable(token) for token in tokens)


def publish(report: Report, out: Path, tracker: Tracker) -> None:
    """Write `report.json` and `report.png`, print the tables, and hand everything to the tracker."""
    write_json(out / REPORT_FILE, asdict(report))
    draw(report, out / FIGURE_FILE)
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
        [one.language, one.asked, one.pieces, one.characters, _round(one.used_in_training), _round(one.used_in_heldout)]
        for one in report.usefulness
    ]
    ratios = ["tokens/char before", "tokens/char after", "bytes/token before", "bytes/token after", "share changed"]
    found = ["asked for", "found", "characters", "share used in training text", "share used in held-out text"]
    return [
        ("fertility", ["language", "documents", *ratios], fertility),
        ("pieces", ["language", *found], pieces),
        (
            "examples",
            ["language", "before", "after"],
            [[one.language, one.before, one.after] for one in report.examples],
        ),
        ("proofs", ["law", "checked", "broken"], [[one.law, one.checked, len(one.failures)] for one in report.proofs]),
    ]


def _round(value: float) -> float:
    return round(value, 4)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if rows and isinstance(rows[0][number], int | float) else "left")
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table, markup=False)


def draw(report: Report, path: Path) -> None:
    """Left: tokens per character before and after. Right: what each further piece brings."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained", dpi=150)
    bars, curves = figure.subplots(1, 2)
    languages = [one.language for one in report.fertility]
    for which, (offset, label) in enumerate(((-0.2, "base"), (0.2, "extended"))):
        values = [one.tokens_per_character[which] for one in report.fertility]
        drawn = bars.bar([place + offset for place in range(len(languages))], values, 0.38, label=label)
        bars.bar_label(drawn, fmt="%.2f", fontsize=8)
    bars.set_xticks(range(len(languages)), languages)
    bars.set_ylabel("tokens per character")
    bars.set_title("Held-out text")
    bars.legend(frameon=False)
    for one in report.usefulness:
        curves.plot(*zip(*one.curve, strict=True), marker="o", markersize=3, label=one.language)
    curves.set_ylim(bottom=0)
    curves.set_xlabel("new pieces")
    curves.set_ylabel("tokens per letter")
    curves.set_title("Text that was learnt from")
    curves.legend(frameon=False)
    for axes in (bars, curves):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
