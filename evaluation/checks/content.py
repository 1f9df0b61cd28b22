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

# what may stand after the end of a sentence: punctuation, emoji, notes
AFTER_END = regex.compile(
    rf"[{regex.escape(TRAILING, special_only=True)}⋯♪♡\p{{So}}\p{{Sk}}\uFE0F\u200D]+$"
)
HAN_NUMBER = "〇零一二三四五六七八九十百千萬万億亿"
PARTICLES = (
    "은|는|이|가|을|를|의|에|에서|도|만|와|과|로|으로|랑|이랑|야|이야|요|예요|이에요|이다|입니다|"
    "입니까|이고|이며|이라고|라고|들|씩|번|개|살|명"
)


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
    if regex.fullmatch(f"[{HAN_NUMBER}]+", plain(word)):  # 七 is not in 十七
        before, after = f"(?<![{HAN_NUMBER}])", f"(?![{HAN_NUMBER}])"
    elif regex.fullmatch(r"\p{Hangul}", plain(word)):  # 개 is not in 번개, 영 is not in 영하
        before, after = r"(?<!\p{Hangul})", rf"(?=(?:{PARTICLES})?(?!\p{{Hangul}}))"
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
    """The reply ends with the text; final punctuation and emoji of both are ignored."""
    wanted = AFTER_END.sub("", plain(text))
    if not wanted:
        return plain(reply).endswith(plain(text))
    return bool(AFTER_END.sub("", plain(reply)).endswith(wanted))


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
    bare = [AFTER_END.sub("", plain(sentence)) for sentence in segments.sentences(reply)]
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
