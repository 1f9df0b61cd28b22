"""Examples of what preparation leaves out or changes, each cut to a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from cpt_merge.core.artifact import write_json

MOST_EXAMPLES = 3  # of each reason and source
EXAMPLES_FILE = "examples.json"  # in the folder of the store, if there are any
_SHOWN = 100  # characters


@dataclass(frozen=True)
class Example:
    """A document that `reason` leaves out; `kept` is the similar one that is in the store."""

    source: str
    reason: str
    text: str
    kept: str = ""


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


def write_examples(store: Path, examples: Iterable[Example]) -> None:
    """Write the examples next to the store, unless there are none."""
    if found := [asdict(example) for example in examples]:
        write_json(store / EXAMPLES_FILE, found)


def read_examples(store: Path) -> list[Example]:
    """The examples of a store."""
    path = store / EXAMPLES_FILE
    return [Example(**one) for one in json.loads(path.read_text())] if path.is_file() else []
