"""Which runs of characters new pieces are learnt from, and may consist of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import regex

from core.languages import Language

WRITTEN_WITHOUT_SPACES = {"Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan"}


@dataclass(frozen=True)
class ScriptRuns:
    """Runs of a language's scripts, with the space before them where its words are set apart by spaces.

    No digits, Latin letters or punctuation, so that text without the script is left alone; and no space before a
    script written without spaces, where it would only learn the habits of a badly wrapped text.
    """

    language: Language
    space: str  # how the tokenizer writes a space: `▁`, `Ġ`

    @property
    def with_space(self) -> bool:
        """Whether a piece may begin with a space."""
        return not WRITTEN_WITHOUT_SPACES & set(self.language.scripts)

    @cached_property
    def pattern(self) -> regex.Pattern[str]:
        """One run, in text where spaces are written as `space`."""
        optional_space = f"{self.space}?" if self.with_space else ""
        return regex.compile(f"{optional_space}(?:{self.language.letters.pattern})+")
