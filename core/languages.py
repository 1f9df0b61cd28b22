"""Languages and scripts, as far as the stages need them: which characters are written in which script."""

from __future__ import annotations

from dataclasses import dataclass

import regex

from core.errors import UserError


@dataclass(frozen=True)
class Language:
    """A language by its tag (`zh_tw`) and the Unicode scripts it is written in, the main one first."""

    tag: str
    name: str
    scripts: tuple[str, ...]

    @property
    def letters(self) -> regex.Pattern[str]:
        """One character of the language's scripts."""
        return script_pattern(self.scripts)


LANGUAGES = {
    language.tag: language
    for language in (
        Language("zh_tw", "Traditional Chinese", ("Han",)),
        Language("zh_cn", "Simplified Chinese", ("Han",)),
        Language("zh_hk", "Cantonese, Traditional script", ("Han",)),
        Language("ko", "Korean", ("Hangul",)),
        Language("ja", "Japanese", ("Han", "Hiragana", "Katakana")),
        Language("en", "English", ("Latin",)),
    )
}


def find_language(tag: str) -> Language:
    """The language of a tag. Raises `UserError` for a tag that is not known."""
    if tag not in LANGUAGES:
        raise UserError(f"language {tag!r} is not known; the known ones are {', '.join(LANGUAGES)}.")
    return LANGUAGES[tag]


def script_pattern(scripts: tuple[str, ...]) -> regex.Pattern[str]:
    """A pattern for one character of any of the Unicode scripts."""
    return regex.compile("[" + "".join(rf"\p{{Script={script}}}" for script in scripts) + "]")


def script_share(text: str, scripts: tuple[str, ...]) -> float:
    """Share of a text's letters that belong to the scripts; 0 where it has no letters at all."""
    letters = regex.findall(r"\p{L}", text)
    if not letters:
        return 0.0
    return len(script_pattern(scripts).findall("".join(letters))) / len(letters)
