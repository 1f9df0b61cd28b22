"""Counts and examples of what preparation leaves out or changes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import write_json

MOST_EXAMPLES = 3  # of each step and source
NOTES_FILE = "preparation.json"  # in the folder of a store, if any step was on
_SHOWN = 100  # characters


@dataclass(frozen=True)
class Example:
    """A document that a step left out or changed; `instead` is what is in the store instead."""

    step: str
    text: str
    instead: str = ""


@dataclass
class Notes:
    """What happened to documents: to those of a block, or of a source."""

    left_out: Counter[str] = field(default_factory=Counter)  # documents, by step
    changed: Counter[str] = field(default_factory=Counter)  # documents, by step
    places: Counter[str] = field(default_factory=Counter)  # changes in them, if they are counted
    examples: list[Example] = field(default_factory=list)

    def leave_out(self, step: str, text: str) -> None:
        """Note that a step leaves a document out."""
        self.left_out[step] += 1
        if self._wants(step):
            self.examples.append(Example(step, first_line(text)))

    def change(self, step: str, before: str, after: str) -> None:
        """Note that a step changed a document."""
        self.changed[step] += 1
        if self._wants(step):
            self.examples.append(Example(step, *where_different(before, after)))

    def replace(self, step: str, after: str, placeholder: str, places: int) -> None:
        """Note that a step put a placeholder at some places. What was there is not kept."""
        self.changed[step] += 1
        self.places[step] += places
        if self._wants(step):
            start = max(0, after.index(placeholder) - _SHOWN // 4)
            shown = ("…" if start else "") + first_line(after[start:])
            self.examples.append(Example(step, "", shown))

    def add(self, other: Notes) -> None:
        """Take in the notes on later documents."""
        self.left_out.update(other.left_out)
        self.changed.update(other.changed)
        self.places.update(other.places)
        for example in other.examples:
            if self._wants(example.step):
                self.examples.append(example)

    def _wants(self, step: str) -> bool:
        return sum(one.step == step for one in self.examples) < MOST_EXAMPLES

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "left_out": dict(self.left_out),
            "changed": dict(self.changed),
            "places": dict(self.places),
            "examples": [asdict(example) for example in self.examples],
        }

    @staticmethod
    def of(values: Mapping[str, Any]) -> Notes:
        """From what `as_dict` gives."""
        left_out, changed, places = (
            Counter[str](values.get(name, {})) for name in ("left_out", "changed", "places")
        )
        return Notes(left_out, changed, places, [Example(**one) for one in values["examples"]])


def first_line(text: str) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text[: 4 * _SHOWN].split())
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"


def where_different(one: str, other: str) -> tuple[str, str]:
    """Two similar texts on a line each, from shortly before the first difference."""
    unlike = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    start = max(0, next(unlike, min(len(one), len(other))) - _SHOWN // 4)
    before = "…" if start else ""
    first, second = (before + first_line(text[start:]) for text in (one, other))
    return first, second


def write_notes(store: Path, of_sources: Sequence[Notes]) -> None:
    """Write the notes on each source into the folder of a store.

    What was left out is in `store.json`.
    """
    rest = [notes.as_dict() for notes in of_sources]
    for notes in rest:
        del notes["left_out"]
    write_json(store / NOTES_FILE, rest)


def read_notes(store: Path) -> list[Notes]:
    """What `write_notes` wrote; empty if no step was on."""
    path = store / NOTES_FILE
    return [Notes.of(one) for one in json.loads(path.read_text())] if path.is_file() else []
