"""How much of a reply repeats itself, as a model does that runs in circles."""

from __future__ import annotations

import regex

from cpt_merge.evaluation.checks.numerals import plain
from cpt_merge.evaluation.checks.segments import RULE

GRAM = 6  # words; a Chinese character and a Korean syllable are one each
LONGEST_RULE = 100  # characters of a horizontal rule; a longer one is no rule any more
TABLE_RULE = regex.compile(r"^[ \t]*\|?[ \t:|-]*-{3,}[ \t:|-]*$", regex.M)
WORD = regex.compile(
    r"\p{Han}|\p{Hangul}|\p{Hiragana}|\p{Katakana}|[\p{L}\p{M}]+|\p{N}+"
    r"|([^\p{L}\p{N}\s])(?=(?:\s?\1){9})"  # a mark that is written ten times or more
)


def repetition(text: str) -> float:
    """1 - distinct / all runs of six words; 0 for a shorter text.

    Numbers are words, so that items of a list that differ in them are no repetition. Rules and the
    lines of tables are left out.
    """
    lines = (line for line in text.splitlines() if not _is_rule(line))
    words = [match[0] for match in WORD.finditer(plain("\n".join(lines)))]
    grams = [tuple(words[start : start + GRAM]) for start in range(len(words) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _is_rule(line: str) -> bool:
    return len(line) <= LONGEST_RULE and bool(RULE.match(line) or TABLE_RULE.match(line))
