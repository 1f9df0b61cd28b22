"""The scripts that new pieces are learnt in, and may consist of.

No digits, Latin letters or punctuation, whatever the text is full of: text without the scripts is then left alone.
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
    """The scripts of one language, with their patterns compiled once."""

    language: Language

    @property
    def set_words_apart(self) -> bool:
        """Whether words are set apart by spaces."""
        return not WRITTEN_WITHOUT_SPACES & set(self.language.scripts)

    @cached_property
    def letter(self) -> regex.Pattern[str]:
        """One character of the scripts."""
        return self.language.letters

    @cached_property
    def run(self) -> regex.Pattern[str]:
        """One character or more."""
        return regex.compile(f"{self.letter.pattern}+", regex.V1)

    @cached_property
    def word(self) -> regex.Pattern[str]:
        """A run, with a `▁` before it where words are set apart by spaces.

        Before a script written without spaces, a space would only teach the habits of badly wrapped text.
        """
        return regex.compile(
            f"▁?{self.run.pattern}" if self.set_words_apart else self.run.pattern, regex.V1
        )

    def spell(self, text: str) -> bool:
        """Whether the text is not empty and all of it belongs to the scripts."""
        return self.run.fullmatch(text) is not None
