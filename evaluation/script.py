"""Is a text in a language's script? Traditional and Simplified Chinese are told apart."""

from __future__ import annotations

import regex

from cpt_merge.core.languages import find_language, script_pattern, script_share

SCRIPT_SHARE = 0.5  # of a text's letters; names, code and quotations may be in another script

# A character that only the one of these encodings has is written in the one script only: 國 is in Big5, 国 in GB 2312,
# 里 in both. {language: (its own, the other's)}
SCRIPT_ENCODINGS = {
    "zh_tw": ("big5", "gb2312"),
    "zh_hk": ("big5hkscs", "gb2312"),
    "zh_cn": ("gb2312", "big5"),
}


def is_in_language(text: str, language: str) -> bool:
    """True if at least half of the letters are in the language's script; of a text without letters, if it holds digits.

    Chinese must also be in the right one of its two scripts: of the characters that only one of them has, at least half
    are the language's. Languages that share a script (English and French) are not told apart.
    """
    if not regex.search(r"\p{L}", text):
        return regex.search(r"\p{N}", text) is not None  # an answer like 17 is in every language
    if script_share(text, find_language(language).scripts) < SCRIPT_SHARE:
        return False
    if language not in SCRIPT_ENCODINGS:
        return True
    own, other = SCRIPT_ENCODINGS[language]
    return characters_only_in(text, own, other) >= characters_only_in(text, other, own)


def other_script_characters(text: str, language: str) -> int:
    """How many characters are written in the other Chinese script only; 0 for other languages."""
    if language not in SCRIPT_ENCODINGS:
        return 0
    own, other = SCRIPT_ENCODINGS[language]
    return characters_only_in(text, other, own)


def characters_only_in(text: str, encoding: str, other: str) -> int:
    """How many Chinese characters of a text `encoding` has and `other` has not."""
    han = script_pattern(("Han",)).findall(text)
    return sum(
        _encodes(character, encoding) and not _encodes(character, other) for character in han
    )


def _encodes(character: str, encoding: str) -> bool:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
