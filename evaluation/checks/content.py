"""What a reply contains, how it begins and ends, and its language. Case does not matter."""

from __future__ import annotations

from typing import Literal

import regex

from cpt_merge.core.errors import UserError
from cpt_merge.core.languages import find_language
from cpt_merge.evaluation.checks import keys, segments
from cpt_merge.evaluation.checks.numerals import plain
from cpt_merge.evaluation.checks.polarity import polarity
from cpt_merge.evaluation.checks.registry import check
from cpt_merge.evaluation.chinese import other_script_characters
from cpt_merge.evaluation.reply_language import is_in_language

MARKS = "\"'“”‘’「」『』《》〈〉（）()【】［］[]*_`~～#>|"  # quotation marks, brackets, Markdown
ENDS = "。．.!！?？…⋯‥,，、;；:："
EMOJI = r"\p{So}\p{Sk}\p{Emoji_Presentation}\uFE0F\u200D\u20E3♪♫♬♡♥\p{Cf}"
LAUGHTER = "ㅋㅎㅠㅜ" + "".join(map(plain, "ㅋㅎㅠㅜ"))
# what may stand after the last word: punctuation, emoji, notes, and Korean laughter
AFTER_END = regex.compile(
    rf"(?:[{regex.escape(MARKS + ENDS, special_only=False)}{EMOJI}\s^=<>\-–—·]|(?<!\p{{Hangul"
    rf"}})[{LAUGHTER}]"
    rf"|[{LAUGHTER}]{{2,}}|\([^()가-힣\p{{Han}}\p{{Latin}}\p{{N}}]{{2,}}\))+$"
)
ASIDE = regex.compile(r"\([^()]*\)\W*$")
BEFORE_START = regex.compile(rf"[{regex.escape(MARKS, special_only=False)}{EMOJI}\s]+")


def _core(text: str) -> str:
    """The plain text without marks before its first word and after its last one."""
    text = plain(text)
    opening = BEFORE_START.match(text)
    return str(AFTER_END.sub("", text[opening.end() :] if opening else text))


def _some(**arguments: list[str]) -> None:
    for name, values in arguments.items():
        if not values or not all(value.strip() for value in values):
            raise ValueError(f"{name} is empty or holds an empty word")


def _not_blank(**arguments: str) -> None:
    for name, value in arguments.items():
        if not value.strip():
            raise ValueError(f"{name} is empty")


def _is_pattern(pattern: str) -> None:
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error})") from None


@check("contains", _some)
def contains(reply: str, *, words: list[str]) -> bool:
    """The reply contains all words; one that it denies (不是 X, not X) does not count."""
    return all(keys.affirms(reply, word) for word in words)


@check("contains_any", _some)
def contains_any(reply: str, *, words: list[str]) -> bool:
    """The reply contains at least one of the words; one that it denies does not count."""
    return any(keys.affirms(reply, word) for word in words)


@check("avoids", _some)
def avoids(reply: str, *, words: list[str]) -> bool:
    """The reply contains none of the words, denied or not."""
    return not any(keys.holds(reply, word) for word in words)


@check("starts_with", _not_blank)
def starts_with(reply: str, *, text: str) -> bool:
    """The reply begins with the text; quotation marks and Markdown before it are ignored."""
    opening = BEFORE_START.match(plain(reply))
    opened = plain(reply)[opening.end() :] if opening else plain(reply)
    return any(one.startswith(plain(text)) for one in (plain(reply), opened))


def _is_paragraph(*, paragraph: int, text: str) -> None:
    _not_blank(text=text)
    if paragraph < 1:
        raise ValueError("paragraph must be at least 1")


@check("paragraph_starts_with", _is_paragraph)
def paragraph_starts_with(reply: str, *, paragraph: int, text: str) -> bool:
    """A paragraph, counted from 1, begins with the text."""
    found = segments.paragraphs(reply)
    return len(found) >= paragraph and starts_with(found[paragraph - 1], text=text)


@check("ends_with", _not_blank)
def ends_with(reply: str, *, text: str) -> bool:
    """The reply ends with the text; punctuation, emoji and an aside after it are ignored."""
    wanted = AFTER_END.sub("", plain(text))
    if not wanted:  # an emoji, or a mark
        return plain(reply).endswith(plain(text))
    text = plain(reply)
    return any(AFTER_END.sub("", one).endswith(wanted) for one in (text, ASIDE.sub("", text)))


@check("repeats_first", _not_blank)
def repeats_first(reply: str, *, text: str) -> bool:
    """The reply repeats the request word for word and continues after it.

    Quotation marks around the request are allowed.
    """
    opened, wanted = plain(reply).lstrip("\"'“‘「『*> "), plain(text)
    return opened.startswith(wanted) and bool(AFTER_END.sub("", opened[len(wanted) :]))


@check("one_of", _some)
def one_of(reply: str, *, words: list[str]) -> bool:
    """The reply is one of the words and nothing else; punctuation and emoji are ignored."""
    return _core(reply) in {_core(word) for word in words}


@check("says")
def says(reply: str, *, answer: Literal["yes", "no"]) -> bool:
    """The reply says yes, or no, in its first words: 是的, 不會, 네, 아니요, No, it is not."""
    return polarity(reply) == answer


@check("matches", _is_pattern)
def matches(reply: str, *, pattern: str) -> bool:
    """The reply contains a match of a regular expression (of the package `regex`)."""
    return regex.search(pattern, reply) is not None


@check("sentences_end_with", _some)
def sentences_end_with(reply: str, *, words: list[str]) -> bool:
    """Every sentence ends with one of the words, such as 요 or 니다; punctuation is ignored.

    So is a parenthesis after the end: 좋아요(웃음).
    """
    found, endings = segments.sentences(reply), tuple(map(plain, words))
    return bool(found) and all(
        any(AFTER_END.sub("", one).endswith(endings) for one in (text, ASIDE.sub("", text)))
        for text in map(plain, found)
    )


def _known(language: str) -> None:
    try:
        find_language(language)
    except UserError as error:
        raise ValueError(str(error).rstrip(".")) from None


@check("language", _known)
def language(reply: str, *, language: str) -> bool:
    """The reply is in the language; Traditional and Simplified Chinese are told apart."""
    return is_in_language(reply, language)


@check("script", _known)
def script(reply: str, *, language: str) -> bool:
    """As `language`, and without any character that only the other Chinese script has."""
    tag = find_language(language).tag
    return is_in_language(reply, tag) and not other_script_characters(reply, tag)
