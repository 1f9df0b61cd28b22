"""The form of a reply as a whole."""

from __future__ import annotations

import json

import regex

from cpt_merge.evaluation.checks import segments
from cpt_merge.evaluation.checks.registry import check

COMMAS = ",，、､﹐؛،"
QUOTES = {"「": "」", "『": "』", "“": "”", '"': '"', "«": "»", "《": "》", "'": "'", "‘": "’"}
TITLES = regex.compile(
    r"《[^《》\n]+》|【[^【】\n]+】|〈[^〈〉\n]+〉|<<[^<>\n]+>>|\[\[[^\[\]\n]+\]\]|『[^『』\n]+』"
)
FENCE = regex.compile(r"\A```(?:json)?\s*\n(.*)\n```\Z", regex.S | regex.I)


@check("json_only")
def json_only(reply: str, *, keys: list[str] | None = None) -> bool:
    """The reply is one JSON object or array alone, or in a Markdown fence, with at least `keys`."""
    fenced = FENCE.match(reply.strip())
    try:
        value = json.loads(fenced[1] if fenced else reply, parse_constant=_not_json)
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, (dict, list)):
        return False
    return not keys or (isinstance(value, dict) and set(keys) <= value.keys())


def _not_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


@check("no_commas")
def no_commas(reply: str) -> bool:
    """No comma of any width and no 、, not even within numbers."""
    return not any(mark in reply for mark in COMMAS)


@check("quoted")
def quoted(reply: str) -> bool:
    """The whole reply is in quotation marks: 「」 『』 “” "" and similar ones."""
    text = reply.strip()
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
    """The first line has a title in brackets: 《》 【】 〈〉 『』 << >> [[ ]]."""
    first = next((line for line in reply.splitlines() if line.strip()), "")
    return TITLES.search(first) is not None


@check("no_digits")
def no_digits(reply: str) -> bool:
    """No digit of any width."""
    return regex.search(r"\p{Nd}", reply) is None


@check("no_lists")
def no_lists(reply: str) -> bool:
    """Prose: no bullets, no numbered items, no headings."""
    return (
        not segments.bullets(reply)
        and not segments.numbers(reply)
        and not regex.search(r"^\s*#", reply, regex.M)
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
    """At least `count` placeholders in square brackets: [name], [姓名], but not 【】."""
    return len(regex.findall(r"\[[^\[\]\n]+\]|［[^［］\n]+］", reply)) >= count


@check("highlights", _at_least_one)
def highlights(reply: str, *, count: int) -> bool:
    """At least `count` passages in Markdown's asterisks: *so* or **so**."""
    return len(regex.findall(r"\*\*[^*\n]+\*\*|(?<!\*)\*[^*\s][^*\n]*\*(?!\*)", reply)) >= count
