"""Sentences, paragraphs, list items and words of text in Chinese, Korean and English."""

from __future__ import annotations

import regex

QUOTED = "[」』”’\"']"
CLOSING = "」』”’\"'）)】》〉］]"
ENDS = "。！？!?．｡"
# a full stop after one of these, after an initial or between digits (3.14) ends nothing
SHORT_FORMS = frozenset(
    "mr mrs ms dr prof st mt vs e.g i.e jr sr inc ltd co approx dept fig vol gen capt "
    "jan feb mar apr jun jul aug sep sept oct nov dec".split()
)
NAMES = ("Yahoo!",)  # with a final mark
DATE = regex.compile(r"\d{2,4}\.\s?\d{1,2}\.(?:\s?\d{1,2}\.)?")  # 1446. 10. 9.
BULLET = regex.compile(
    r"^[ \t]*(?:[-*+–—][ \t]+|[•·・‧●○▪◦‣※■□▶►▷◆◇★☆◎✅✔☑➤]\uFE0F?[ \t　]*)(?=\S)", regex.M
)
RULE = regex.compile(r"^[ \t]*([-*_=][ \t]*){3,}$", regex.M)  # a horizontal rule in Markdown
HAN_NUMBERS = "一二三四五六七八九十"
NUMBER = regex.compile(
    r"^[ \t]*(?:#{1,6}[ \t]+)?(?:\*\*|__)?"  # Markdown's marks of a heading or of bold text
    r"(?:[（(]?(\d{1,3})(?:[.．)）、:]|번[.:)]?|\uFE0F?\u20E3)(?!\d)|([①-⑳])"
    rf"|[（(]?([{HAN_NUMBERS}]{{1,3}})(?:[、.．](?![{HAN_NUMBERS}])|[)）]))"
    r"(?:\*\*|__)?[ \t　]*(?=\S)",
    regex.M,
)
MARKERS = regex.compile(rf"(?:{NUMBER.pattern}|{BULLET.pattern})", regex.M)


def sentences(text: str) -> list[str]:
    """The sentences of a text.

    The end of a line ends a sentence, so a title or a list item counts as one; the mark of an item
    is no sentence. The end of a quotation does not end the sentence around it if the text continues
    directly (「好。」他說。) or with a small letter ("Stop!" she said.). An ellipsis within a line
    ends nothing.
    """
    found: list[str] = []
    for line in RULE.sub("", text).splitlines():
        rest = MARKERS.sub("", line)
        start = 0
        for match in regex.finditer(rf"[{ENDS}]+|\.+", rest):
            end = _end(rest, match.start(), match.end())
            if end is not None:
                found.append(rest[start:end])
                start = end
        found.append(rest[start:])
    return [sentence.strip() for sentence in found if regex.search(r"[\p{L}\p{N}]", sentence)]


def _end(line: str, start: int, stop: int) -> int | None:
    """The end of the sentence with the final marks line[start:stop]; None if they end none."""
    if line[:stop].endswith(NAMES) and line[stop:].strip():
        return None
    after = regex.compile(f"[{regex.escape(CLOSING, special_only=False)}]*").match(line, stop)
    assert after is not None
    follows = line[after.end() : after.end() + 1]
    if regex.search(QUOTED, after[0]) and regex.match(
        r"[\p{L}\p{N}]|\s+\p{Ll}", line[after.end() :]
    ):
        return None
    if line[start] == "." and not _full_stop(line, start, stop, follows):
        return None
    return int(after.end())


def _full_stop(line: str, start: int, stop: int, follows: str) -> bool:
    """Whether the dots line[start:stop] end a sentence, not a number, a short form or a pause."""
    if follows and not follows.isspace() and not regex.match(r"\p{Han}|\p{Hangul}", follows):
        return False
    for date in DATE.finditer(line):
        if date.start() < start < date.end() and regex.match(r"\s?[\p{N}\p{Hangul}]", line[stop:]):
            return False
    word = regex.search(r"[\p{L}.]*$", line[:start])
    assert word is not None
    if stop - start > 1:
        return not line[stop:].strip()
    if word[0] == "No" and regex.match(r"\s*\d", line[stop:]):  # No. 5
        return False
    if "." in word[0] and regex.match(r"\s+\p{Ll}", line[stop:]):  # a Ph.D. from London
        return False
    return word[0].lower() not in SHORT_FORMS and not regex.fullmatch(
        r"\p{Lu}|(\p{L}\.)+\p{L}", word[0]
    )


def paragraphs(text: str) -> list[str]:
    """The parts between blank lines or rules; every line if there is no blank one."""
    text = RULE.sub("", text).strip()
    divider = r"\n[ \t　]*\n" if regex.search(r"\n[ \t　]*\n", text) else r"\n"
    return [part.strip() for part in regex.split(divider, text) if part.strip()]


def bullets(text: str) -> list[str]:
    """The lines that begin with a bullet such as - * • · ・ ●."""
    return [line for line in text.splitlines() if BULLET.match(line) and not RULE.match(line)]


def numbers(text: str) -> list[int]:
    """The numbers at the start of lines, such as `1.`, `(1)`, `1、`, `①`, `1번` or `一、`.

    Numbers of nested lists are left out.
    """
    found = [
        (len(match[0]) - len(match[0].lstrip(" \t")), _number(match))
        for match in NUMBER.finditer(text)
    ]
    # a reply is stripped, so its first line may have lost the indentation of the others
    outermost = min(
        (indent for indent, _ in (found[1:] if NUMBER.match(text) else found)), default=0
    )
    return [
        number for place, (indent, number) in enumerate(found) if place == 0 or indent == outermost
    ]


def _number(match: regex.Match[str]) -> int:
    if match[1]:
        return int(match[1])
    if match[2]:
        return ord(match[2]) - ord("①") + 1
    tens, ten, ones = match[3].rpartition("十")
    return (HAN_NUMBERS.find(tens) + 1 if tens else 1) * 10 * bool(ten) + (
        HAN_NUMBERS.find(ones) + 1 if ones else 0
    )


def words(text: str) -> list[str]:
    """What is between spaces and has a letter or digit (in Korean: 어절); useless for Chinese."""
    return [word for word in text.split() if regex.search(r"[\p{L}\p{N}]", word)]


def characters(text: str) -> list[str]:
    """Characters as people see them, with punctuation and without white space."""
    return [character for character in regex.findall(r"\X", text) if not character.isspace()]
