"""The steps from a text as it was read to the text of a document."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cpt_merge.data.preparation import chinese
from cpt_merge.data.preparation.notes import Notes

BAD_ROWS, EMPTY = "bad_rows", "empty"  # why documents are left out without any step


class Step(Protocol):
    """Changes a text, or leaves it out."""

    @property
    def changes(self) -> Sequence[str]:
        """The names under which changes are counted."""

    @property
    def leaves_out(self) -> Sequence[str]:
        """The names under which documents that are left out are counted."""

    def __call__(self, text: str, notes: Notes) -> str:
        """The text, "" to leave it out; both are noted."""


@dataclass(frozen=True)
class Conversion:
    """Converts between Traditional and Simplified Chinese."""

    conversion: str
    changes: Sequence[str] = (chinese.STEP,)
    leaves_out: Sequence[str] = ()

    def __call__(self, text: str, notes: Notes) -> str:
        """See `Step`."""
        converted = chinese.convert(text, self.conversion)
        if converted != text:
            notes.change(chinese.STEP, text, converted)
        return converted


@dataclass(frozen=True)
class Preparation:
    """What becomes of the texts of a source."""

    normalization: Literal["NFC", "none"]
    steps: Sequence[Step] = ()

    def __call__(self, text: str, notes: Notes) -> str:
        """The text of the document; "" if it is left out."""
        if self.normalization != "none":
            text = unicodedata.normalize(self.normalization, text)
        if not text.strip():
            notes.left_out[EMPTY] += 1
            return ""
        for step in self.steps:
            text = step(text, notes)
            if not text:
                return ""
        return text

    def no_notes(self) -> Notes:
        """Notes with a count of 0 for everything that may happen."""
        notes = Notes()
        notes.left_out.update({EMPTY: 0})
        for step in self.steps:
            notes.left_out.update(dict.fromkeys(step.leaves_out, 0))
            notes.changed.update(dict.fromkeys(step.changes, 0))
        return notes
