"""The scripts in which new pieces are learnt.

Pieces contain no digits, no Latin letters and no punctuation, so that text without these scripts
does not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import regex

from cpt_merge.core.languages import Language

WRITTEN_WITHOUT_SPACES = {
    "Han",
    "Hiragana",
    "Katakana",
    "Thai",
    "Lao",
    "Khmer",
    "Myanmar",
    "Tibetan",
}


@dataclass(frozen=True)
class Scripts:
    """The scripts of one language, with compiled patterns."""

    language: Language

    @property
    def set_words_apart(self) -> bool:
        """Whether spaces separate words."""
        return not WRITTEN_WITHOUT_SPACES & set(self.language.scripts)

    @cached_property
    def letter(self) -> regex.Pattern[str]:
        """One character of the scripts."""
        return self.language.letters

    @cached_property
    def run(self) -> regex.Pattern[str]:
        """One or more characters."""
        return regex.compile(f"{self.letter.pattern}+", regex.V1)

    @cached_property
    def word(self) -> regex.Pattern[str]:
        """A run, with an optional preceding `▁` if spaces separate words.

        In a script without spaces, a preceding space is mostly an artefact of wrapped lines.
        """
        return regex.compile(
            f"▁?{self.run.pattern}" if self.set_words_apart else self.run.pattern, regex.V1
        )

    def spell(self, text: str) -> bool:
        """Whether the text is a non-empty run of the scripts."""
        return self.run.fullmatch(text) is not None
