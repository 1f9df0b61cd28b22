"""Quality filters: documents with the marks of poor text are left out.

The thresholds were published for text whose words are known: Gopher (Rae et al., arXiv 2112.11446,
table A1), FineWeb-2 (arXiv 2506.20920, configs/LANGUAGE.yml), Swallow (arXiv 2404.17733) and C4
(arXiv 1910.10683). Here words are what spaces separate; in languages without spaces letters stand
for words, 1.6 of them for one (the usual length of a Chinese word), and runs are as much longer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cpt_merge.core.config import LanguageTag, Section, key
from cpt_merge.core.languages import Language, find_language, script_share
from cpt_merge.data.preparation.notes import Notes

BOILERPLATE = "boilerplate_lines"

_MEASURED = 1_000_000  # characters at the beginning of a text
_FEW_LINES = 3  # from which on it counts how lines end
_WORDS = re.compile(r"\S+")
_WITH_LETTER = re.compile(r"\S*[^\W\d_]\S*")
_SYMBOLS = re.compile(r"#|\.\.\.|…")
_ENDS = tuple(""".!?…。！？｡"'”’」』》）)~]""")
_LONGEST_BOILERPLATE = 200  # characters; a longer line is text that mentions such a phrase
_BOILERPLATE = (  # C4's phrases and their counterparts, in lower case
    "javascript", "lorem ipsum", "terms of use", "privacy policy", "cookie policy", "uses cookies",
    "use of cookies", "use cookies", "all rights reserved",
    "版權所有", "版权所有", "著作權所有", "隱私權政策", "隐私政策", "使用條款", "使用条款",
    "服務條款", "服务条款", "轉載請註明", "转载请注明", "備案號", "备案号", "icp備", "icp备",
    "개인정보처리방침", "개인정보 처리방침", "개인정보취급방침", "이용약관",
    "무단전재", "무단 전재", "재배포 금지", "재배포금지", "저작권자ⓒ", "저작권자 ⓒ", "저작권자©",
    "無断転載", "無断複製", "利用規約", "プライバシーポリシー", "個人情報保護方針",
)  # fmt: skip


class QualityFilter(Section):
    """Filters for the text of one language. What is not set has the language's default."""

    language: LanguageTag = key(..., "language of the sources whose documents are filtered")
    min_length: int | None = key(
        None, "fewest words (Chinese, Japanese: letters); default 50 words or 80 letters (Gopher)",
        ge=0,
    )  # fmt: skip
    max_length: int | None = key(
        None, "most words; default 100,000 words or 160,000 letters (Gopher)", gt=0
    )
    script: float | None = key(
        None, "least share of the letters in the language's script; default 0.5 (Swallow)", ge=0,
        le=1,
    )  # fmt: skip
    letters: float | None = key(
        None,
        "least share of the words that contain a letter (Chinese, Japanese: of the characters that "
        "are letters); default 0.8 (Gopher), ko 0.791, zh 0.735, ja 0.759 (FineWeb-2)",
        ge=0,
        le=1,
    )
    symbols: float | None = key(
        None, "most `#` and `…` per word; default 0.1 (Gopher), 0.0625 per letter", ge=0
    )
    repeated_lines: float | None = key(
        None,
        "largest share of the lines that repeat an earlier one; default 0.3 (Gopher), ko 0.374, zh "
        "0.287, ja 0.375 (FineWeb-2)",
        ge=0,
        le=1,
    )
    repeated_runs: float | None = key(
        None,
        "largest share of the text in runs of 10 words (16 letters) that occurred before; default "
        "0.1 (Gopher), zh and ko 0.127, ja 0.223 (FineWeb-2)",
        ge=0,
        le=1,
    )
    ended_lines: float | None = key(
        None,
        "least share of the lines that end like a sentence; default 0.12 (FineWeb), ko 0.062, zh "
        "0.106, ja 0.167 (FineWeb-2)",
        ge=0,
        le=1,
    )
    boilerplate: bool = key(
        True, "remove short lines with phrases such as `privacy policy` or `版權所有` (C4)"
    )

    def thresholds(self) -> Thresholds:
        """The thresholds, with the language's defaults for those that are not set."""
        given = self.model_dump(exclude_none=True)
        return Thresholds(**(_defaults(find_language(self.language)) | given))


@dataclass(frozen=True)
class Thresholds:
    """A `QualityFilter` with a value for everything."""

    language: str
    min_length: int
    max_length: int
    script: float
    letters: float
    symbols: float
    repeated_lines: float
    repeated_runs: float
    ended_lines: float
    boilerplate: bool


def _defaults(language: Language) -> dict[str, Any]:
    letters, repeated_lines, repeated_runs, ended_lines = {
        ("Han",): (0.735, 0.287, 0.127, 0.106),
        ("Hangul",): (0.791, 0.374, 0.127, 0.062),
        ("Han", "Hiragana", "Katakana"): (0.759, 0.375, 0.223, 0.167),
    }.get(language.scripts, (0.8, 0.3, 0.1, 0.12))
    length = 1 if language.has_spaces else 1.6  # of a word
    return {
        "min_length": round(50 * length),
        "max_length": round(100_000 * length),
        "script": 0.5,
        "letters": letters,
        "symbols": 0.1 / length,
        "repeated_lines": repeated_lines,
        "repeated_runs": repeated_runs,
        "ended_lines": ended_lines,
    }


class _Measured:
    """The beginning of a text, with its words (or letters) and its lines."""

    def __init__(self, text: str, has_spaces: bool) -> None:
        self.has_spaces = has_spaces
        self.text = text[:_MEASURED]
        words = _WORDS.findall(self.text)
        self.units: Sequence[str] = words if has_spaces else "".join(words)
        self.lines = [line.strip() for line in self.text.split("\n") if line.strip()]
        self.whole = len(text) / max(len(self.text), 1)  # in beginnings

    def length(self) -> float:
        """How many words or letters the whole text has."""
        return len(self.units) * self.whole

    def script(self, language: str) -> float:
        """Share of the letters in the language's script."""
        return script_share(self.text, find_language(language).scripts)

    def letters(self) -> float:
        """Share of the words with a letter, or of the characters that are letters."""
        if self.has_spaces:
            return len(_WITH_LETTER.findall(self.text)) / len(self.units)
        return sum(map(str.isalpha, self.units)) / len(self.units)

    def symbols(self) -> float:
        """`#` and `…` per word or letter."""
        return len(_SYMBOLS.findall(self.text)) / len(self.units)

    def repeated_lines(self) -> float:
        """Share of the lines that repeat an earlier one."""
        return 1 - len(set(self.lines)) / len(self.lines)

    def repeated_runs(self) -> float:
        """Share of the words or letters in runs that occurred before, each counted once."""
        units, length = (tuple(self.units), 10) if self.has_spaces else (self.units, 16)
        seen, repeated, place = set[Sequence[str]](), 0, 0
        while place + length <= len(units):
            run = units[place : place + length]
            if run in seen:
                repeated += length
                place += length
            else:
                seen.add(run)
                place += 1
        return repeated / len(units)

    def ended_lines(self) -> float:
        """Share of the lines that end like a sentence; 1 if there are only one or two."""
        if len(self.lines) < _FEW_LINES:
            return 1
        return sum(line.endswith(_ENDS) for line in self.lines) / len(self.lines)


# in the order in which they are tried
_CHECKS: dict[str, Callable[[_Measured, Thresholds], bool]] = {
    "too_short": lambda text, most: text.length() < max(most.min_length, 1),
    "too_long": lambda text, most: text.length() > most.max_length,
    "few_letters": lambda text, most: text.letters() < most.letters,
    "other_script": lambda text, most: text.script(most.language) < most.script,
    "symbols": lambda text, most: text.symbols() > most.symbols,
    "repeated_lines": lambda text, most: text.repeated_lines() > most.repeated_lines,
    "unended_lines": lambda text, most: text.ended_lines() < most.ended_lines,
    "repeated_runs": lambda text, most: text.repeated_runs() > most.repeated_runs,
}


@dataclass(frozen=True)
class Filtering:
    """Removes boilerplate lines, and leaves out documents beyond the thresholds."""

    thresholds: Thresholds
    leaves_out: Sequence[str] = tuple(_CHECKS)

    @property
    def changes(self) -> Sequence[str]:
        """See `Step`."""
        return (BOILERPLATE,) if self.thresholds.boilerplate else ()

    def __call__(self, text: str, notes: Notes) -> str:
        """See `Step`."""
        if self.thresholds.boilerplate:
            text = _without_boilerplate(text, notes)
        measured = _Measured(text, find_language(self.thresholds.language).has_spaces)
        for name, fails in _CHECKS.items():
            if fails(measured, self.thresholds):
                notes.leave_out(name, text)
                return ""
        return text


def _without_boilerplate(text: str, notes: Notes) -> str:
    folded = text.lower()
    if not any(phrase in folded for phrase in _BOILERPLATE):
        return text
    lines = text.split("\n")
    kept = [line for line in lines if not _is_boilerplate(line)]
    if len(kept) == len(lines):
        return text
    after = "\n".join(kept)
    notes.change(BOILERPLATE, text, after)
    notes.places[BOILERPLATE] += len(lines) - len(kept)
    return after


def _is_boilerplate(line: str) -> bool:
    folded = line.lower()
    return len(line) <= _LONGEST_BOILERPLATE and any(phrase in folded for phrase in _BOILERPLATE)
