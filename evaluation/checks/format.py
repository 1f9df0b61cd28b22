"""The form of a reply as a whole."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import regex

from cpt_merge.evaluation.checks import segments
from cpt_merge.evaluation.checks.registry import check

COMMAS = ",，、､﹐﹑︐︑؛،"
QUOTES = {"「": "」", "『": "』", "“": "”", '"': '"', "«": "»", "《": "》", "'": "'", "‘": "’"}
QUOTES |= {"＂": "＂", "〝": "〞", "„": "“", "‹": "›", "﹁": "﹂", "﹃": "﹄", "〈": "〉"}
TITLES = regex.compile(
    r"《[^《》\n]+》|【[^【】\n]+】|〈[^〈〉\n]+〉|<<[^<>\n]+>>|\[\[[^\[\]\n]+\]\]|『[^『』\n]+』"
)
# **so** or *so*, but not 2*3*4
HIGHLIGHT = regex.compile(
    r"\*\*(?=[^*\n]*[^*\s])[^*\n]+\*\*|(?<![*\p{N}])\*[^*\s][^*\n]*(?<!\s)\*(?![*\p{N}])"
)
FENCE = regex.compile(r"\A(```+|~~~+)[ \t]*[\w+.-]*[ \t]*\n(.*)\n[ \t]*\1\Z", regex.S)


@check("json_only")
def json_only(reply: str, *, keys: list[str] | None = None) -> bool:
    """The reply is one JSON object or array alone, or in a Markdown fence, with at least `keys`.

    NaN, Infinity and a key that stands twice in an object are no JSON.
    """
    text = reply.strip().strip("\ufeff")
    fenced = FENCE.match(text)
    try:
        value = json.loads(
            fenced[2] if fenced else text, parse_constant=_not_json, object_pairs_hook=_unique
        )
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, (dict, list)):
        return False
    return not keys or (isinstance(value, dict) and set(keys) <= value.keys())


def _not_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


@check("no_commas")
def no_commas(reply: str) -> bool:
    """No comma of any width and no 、, not even within numbers."""
    return not any(mark in reply for mark in COMMAS)


@check("quoted")
def quoted(reply: str) -> bool:
    """The whole reply is in quotation marks: 「」 『』 “” "" and similar ones."""
    text = reply.strip().strip("*_").strip()
    opening, closing = text[:1], QUOTES.get(text[:1])
    if len(text) <= 2 or text[-1] != closing:
        return False
    inner = regex.sub(r"(?<=\p{L})['’](?=\p{L})", "", text[1:-1])  # It's
    depth = 1
    for character in inner:  # 「a」和「b」 is two quotations
        depth += (character == opening != closing) - (character == closing)
        if depth == 0:
            return False
    return True


@check("title")
def title(reply: str) -> bool:
    """The first line is or has a title in brackets: 《》 【】 〈〉 『』 << >> [[ ]].

    A sentence that mentions a book (我讀了《紅樓夢》。) is no title.
    """
    first = next((line.strip() for line in reply.splitlines() if line.strip()), "")
    found = TITLES.search(first)
    return found is not None and not regex.search(
        r"\p{L}[^\p{L}]*[。．.！!？?]\W*$", first[found.end() :]
    )


@check("no_digits")
def no_digits(reply: str) -> bool:
    """No digit of any width, nor one in a circle or raised: ３, ①, ², but ㎡ and 三 are none."""
    return not any(
        regex.search(r"\p{Nd}", unicodedata.normalize("NFKC", character))
        for character in regex.findall(r"\p{N}", reply)
    )


@check("no_lists")
def no_lists(reply: str) -> bool:
    """Prose: no bullets, no items with numbers or letters, no headings, no table."""
    return (
        not segments.bullets(reply)
        and not segments.numbers(reply)
        and not regex.search(r"^\s*#{1,6}\s|^\s*\|.*\|\s*$", reply, regex.M)
        and len(
            regex.findall(r"^\s*\(?(?:[a-z]|[가나다라마바사])[.)]\s*\S", reply, regex.M | regex.I)
        )
        < 2
    )


@check("uppercase")
def uppercase(reply: str) -> bool:
    """No letter is small, and one is a capital."""
    return reply.upper() == reply and reply.lower() != reply


@check("lowercase")
def lowercase(reply: str) -> bool:
    """No letter is a capital, and one is small."""
    return reply.lower() == reply and reply.upper() != reply


def _at_least_one(count: int) -> None:
    if count < 1:
        raise ValueError("count must be at least 1")


@check("placeholders", _at_least_one)
def placeholders(reply: str, *, count: int) -> bool:
    """At least `count` placeholders in brackets: [name], ［姓名］; not 【】, [x], [1], a link."""
    inner = r"(?!\s*[xX\d]?\s*[\]］])"
    found = regex.findall(rf"\[{inner}[^\[\]\n]+\](?!\()|［{inner}[^［］\n]+］", reply)
    return len(found) >= count


@check("highlights", _at_least_one)
def highlights(reply: str, *, count: int) -> bool:
    """At least `count` passages in Markdown's asterisks: *so* or **so**."""
    return len(HIGHLIGHT.findall(reply)) >= count
