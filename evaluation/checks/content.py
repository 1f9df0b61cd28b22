"""What a reply contains, how it begins and ends, and its language. Case does not matter."""

from __future__ import annotations

import unicodedata

import regex

from cpt_merge.core.errors import UserError
from cpt_merge.core.languages import find_language
from cpt_merge.evaluation.checks import segments
from cpt_merge.evaluation.checks.registry import check
from cpt_merge.evaluation.chinese import other_script_characters
from cpt_merge.evaluation.reply_language import is_in_language

TRAILING = "。．.!！?？~～…\"'”’」』)）】*_` \t\n　"


def plain(text: str) -> str:
    """The text for comparison: in one width (Ａ and A), one case, with single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).split()).casefold()


def _has(reply: str, word: str) -> bool:
    """Whether a word occurs; one of Latin letters or digits as a whole: `cat` is not in `cats`."""
    inner = regex.escape(plain(word))
    before = r"(?<![\p{Latin}\p{N}])" if regex.match(r"[\p{Latin}\p{N}]", plain(word)) else ""
    after = r"(?![\p{Latin}\p{N}])" if regex.search(r"[\p{Latin}\p{N}]$", plain(word)) else ""
    # 7 is not in 3.7 or 1,700 either, but it is in lists like 7, 8 and 7，8
    before += (
        r"(?<!\p{N}\.)(?<!\p{N},(?=\p{N}{3}(?!\p{N})))"
        if regex.match(r"\p{N}", plain(word))
        else ""
    )
    after += r"(?!\.\p{N}|,\p{N}{3}(?!\p{N}))" if regex.search(r"\p{N}$", plain(word)) else ""
    return regex.search(before + inner + after, plain(reply.replace("，", "、"))) is not None


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
    """The reply contains all words."""
    return all(_has(reply, word) for word in words)


@check("contains_any", _some)
def contains_any(reply: str, *, words: list[str]) -> bool:
    """The reply contains at least one of the words."""
    return any(_has(reply, word) for word in words)


@check("avoids", _some)
def avoids(reply: str, *, words: list[str]) -> bool:
    """The reply contains none of the words."""
    return not any(_has(reply, word) for word in words)


@check("starts_with", _not_blank)
def starts_with(reply: str, *, text: str) -> bool:
    """The reply begins with the text."""
    return plain(reply).startswith(plain(text))


@check("ends_with", _not_blank)
def ends_with(reply: str, *, text: str) -> bool:
    """The reply ends with the text; final punctuation of both is ignored."""
    return plain(reply).rstrip(TRAILING).endswith(plain(text).rstrip(TRAILING) or plain(text))


@check("repeats_first", _not_blank)
def repeats_first(reply: str, *, text: str) -> bool:
    """The reply repeats the request word for word and continues after it.

    Quotation marks around the request are allowed.
    """
    opened, wanted = plain(reply).lstrip("\"'“‘「『*> "), plain(text)
    return opened.startswith(wanted) and bool(opened[len(wanted) :].strip(TRAILING))


@check("one_of", _some)
def one_of(reply: str, *, words: list[str]) -> bool:
    """The reply is one of the words and nothing else; final punctuation is ignored."""
    return plain(reply).strip(TRAILING + "「『“(（【") in {
        plain(word).strip(TRAILING + "「『“(（【") for word in words
    }


@check("matches", _is_pattern)
def matches(reply: str, *, pattern: str) -> bool:
    """The reply contains a match of a regular expression (of the package `regex`)."""
    return regex.search(pattern, reply) is not None


@check("sentences_end_with", _some)
def sentences_end_with(reply: str, *, words: list[str]) -> bool:
    """Every sentence ends with one of the words, such as 요 or 니다; punctuation is ignored."""
    bare = [plain(sentence).rstrip(TRAILING) for sentence in segments.sentences(reply)]
    return bool(bare) and all(sentence.endswith(tuple(map(plain, words))) for sentence in bare)


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
    return is_in_language(reply, language) and not other_script_characters(reply, language)
