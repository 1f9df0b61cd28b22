"""Words in which a key has another sense: a burdock (牛蒡) is no beef (牛)."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import regex

FILE = files("cpt_merge.evaluation.checks") / "other_senses.txt"


@cache
def other_senses() -> dict[str, regex.Pattern[str]]:
    """For each key, the words in which it means something else."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    rows = (line.partition(": ") for line in lines if not line.startswith("#"))
    return {key: _any_of(words.split(", ")) for key, _, words in rows}


@cache
def _numerals() -> regex.Pattern[str]:
    """The words in which a numeral is no number."""
    return regex.compile(
        "|".join(
            pattern.pattern
            for key, pattern in other_senses().items()
            if regex.fullmatch("[零一二三四五六七八九十兩两千萬万伍陸陆]", key)
        )
    )


def _any_of(words: list[str]) -> regex.Pattern[str]:
    return regex.compile("|".join(map(_word, sorted(words, key=len, reverse=True))))


def _word(written: str) -> str:
    """十分!鐘 is 十分 where no 鐘 follows."""
    word, excepted, following = written.partition("!")
    return str(regex.escape(word)) + (f"(?![{following}])" if excepted else "")


def within_other_sense(text: str, start: int, end: int, key: str = "") -> bool:
    """Whether text[start:end] is in a word in which the key, or a numeral, means something else."""
    pattern = other_senses().get(key) if key else _numerals()
    return pattern is not None and any(
        match.start() <= start and end <= match.end()
        for match in pattern.finditer(text, max(0, start - 8), end + 8, overlapped=True)
    )
