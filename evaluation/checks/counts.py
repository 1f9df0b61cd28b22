"""Checks that count; each takes `at_least`, `at_most` or both, or `exactly`."""

from __future__ import annotations

import regex

from cpt_merge.evaluation.checks import segments
from cpt_merge.evaluation.checks.numerals import plain
from cpt_merge.evaluation.checks.registry import count


@count("characters")
def count_characters(reply: str) -> int:
    """Characters as people see them, with punctuation and without white space."""
    return len(segments.characters(reply))


@count("words")
def count_words(reply: str) -> int:
    """Words between spaces, for languages with spaces."""
    return len(segments.words(reply))


@count("sentences")
def count_sentences(reply: str) -> int:
    """Sentences, as `segments.sentences` finds them."""
    return len(segments.sentences(reply))


@count("paragraphs")
def count_paragraphs(reply: str) -> int:
    """Parts between blank lines, or lines if there is no blank one."""
    return len(segments.paragraphs(reply))


@count("lines")
def count_lines(reply: str) -> int:
    """Lines that are not blank."""
    return sum(bool(line.strip()) for line in reply.splitlines())


@count("bullets")
def count_bullets(reply: str) -> int:
    """Lines that begin with a bullet."""
    return len(segments.bullets(reply))


@count("numbered_items")
def count_numbered(reply: str) -> int:
    """Items of a list numbered 1, 2, 3, ...; 0 if the numbers are others."""
    found = segments.numbers(reply)
    return len(found) if found == list(range(1, len(found) + 1)) else 0


@count("sections")
def count_sections(reply: str, *, heading: str) -> int:
    """Lines that begin with a heading: {"heading": "第"}, "Section", "#".

    Markdown's marks, brackets, quotation marks, bullets, emoji and a number before it do not
    matter.
    """
    wanted = plain(heading)
    return sum(
        plain(line).startswith(wanted)
        or (not heading.startswith("#") and _bare(line).startswith(wanted))
        for line in reply.splitlines()
    )


def _bare(line: str) -> str:
    """The line from its first letter on, after a number such as `1.` or `Ⅱ.`."""
    opening = (
        rf"^(?:{segments.NUMBER.pattern}|[ \t]*[ⅠⅡⅢⅣⅤⅥⅦⅧⅨⅩIVXA-H]{{1,4}}[.)、]|<h\d>|[^"
        rf"\p{{L}}\p{{N}}\n])+"
    )
    return plain(str(regex.sub(opening, "", line)))


@count("occurrences")
def count_occurrences(reply: str, *, word: str) -> int:
    """Occurrences of a word in any case; in Latin letters, as a whole word."""
    edge = r"[\p{Latin}\p{M}\p{N}]"
    before = rf"(?<!{edge})" if regex.match(edge, word) else ""
    after = rf"(?!{edge})" if regex.search(rf"{edge}$", word) else ""
    return len(regex.findall(before + regex.escape(plain(word)) + after, plain(reply)))


@count("letters")
def count_letters(reply: str, *, letter: str) -> int:
    """How often a letter occurs, in any case and within words."""
    return plain(reply).count(plain(letter))


@count("capital_words")
def count_capital_words(reply: str) -> int:
    """Words whose letters are all capitals."""
    return sum(word.upper() == word != word.lower() for word in segments.words(reply))
