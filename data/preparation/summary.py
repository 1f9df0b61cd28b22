"""One table of what each step did to the documents of each source, and examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from cpt_merge.core.progress import console, say
from cpt_merge.data.preparation.notes import Notes
from cpt_merge.data.store import SourceInfo, StoreInfo, readable
from cpt_merge.tracking import Cell, Tracker


@dataclass(frozen=True)
class Effect:
    """What a step did to the documents of a source. `share` is that of the documents read."""

    source: str
    step: str
    effect: str  # left out or changed
    documents: int
    share: float
    places: int | None = None  # how many changes, if they are counted

    @staticmethod
    def columns() -> list[str]:
        """The headings of `row`."""
        return ["source", "step", "effect", "documents", "share", "places"]

    def row(self) -> list[Cell]:
        """The row of a table."""
        return [
            self.source, self.step, self.effect, self.documents, round(self.share, 6), self.places
        ]  # fmt: skip


def effects_of(source: SourceInfo, notes: Notes) -> list[Effect]:
    """The effects on a source, those of steps that found nothing included."""
    kept = source.train.documents + source.heldout.documents
    read = max(1, kept + sum(source.left_out.values()))
    changed = [
        Effect(source.name, readable(step), "changed", count, count / read, notes.places.get(step))
        for step, count in notes.changed.items()
    ]
    left_out = [
        Effect(source.name, readable(step), "left out", count, count / read)
        for step, count in source.left_out.items()
    ]
    return [*changed, *left_out]


def show_preparation(
    effects: Sequence[Effect], info: StoreInfo, notes: Sequence[Notes], tracker: Tracker
) -> None:
    """Print the effects on any documents, and log examples."""
    table = Table(box=None, padding=(0, 2))
    for heading in Effect.columns():
        numeric = heading in ("documents", "share", "places")
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=True)
    for one in effects:
        if one.documents:
            places = "" if one.places is None else f"{one.places:,}"
            names = (one.source, one.step, one.effect)
            table.add_row(*map(escape, names), f"{one.documents:,}", f"{one.share:.2%}", places)
    console.print(table)
    examples: list[list[Cell]] = [
        [source.name, readable(one.step), one.text, one.instead]
        for source, of_source in zip(info.sources, notes, strict=True)
        for one in of_source.examples
    ]
    if examples:
        tracker.table("data/examples", ["source", "step", "text", "instead of it"], examples)
        say("  examples are in the table data/examples of the log and of the report")
