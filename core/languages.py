"""Languages, their scripts, and which characters belong to a script."""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import dataclass
from functools import cache

import regex

from cpt_merge.core.errors import UserError


@dataclass(frozen=True)
class Language:
    """A language with its tag (`zh_tw`) and its Unicode scripts, the main one first."""

    tag: str
    name: str
    scripts: tuple[str, ...]

    @property
    def has_spaces(self) -> bool:
        """Whether spaces separate the words of a text."""
        return self.scripts[0] not in _SCRIPTS_WITHOUT_SPACES

    @property
    def letters(self) -> regex.Pattern[str]:
        """One character of the language's scripts."""
        return script_pattern(self.scripts)


LANGUAGES = {
    language.tag: language
    for language in (
        Language("zh_tw", "Traditional Chinese", ("Han",)),
        Language("zh_cn", "Simplified Chinese", ("Han",)),
        Language("zh_hk", "Cantonese, Traditional script", ("Han",)),
        Language("ko", "Korean", ("Hangul",)),
        Language("ja", "Japanese", ("Han", "Hiragana", "Katakana")),
        Language("en", "English", ("Latin",)),
    )
}
# ISO 15924 codes that are not Unicode script names, or that stand for several scripts
_SCRIPTS_OF_CODE = {
    "Hani": ("Han",), "Hans": ("Han",), "Hant": ("Han",),
    "Jpan": ("Han", "Hiragana", "Katakana"),
    "Hang": ("Hangul",), "Kore": ("Hangul",), "Hira": ("Hiragana",),
    "Kana": ("Katakana",), "Latn": ("Latin",),
    "Laoo": ("Lao",), "Khmr": ("Khmer",), "Mymr": ("Myanmar",), "Tibt": ("Tibetan",),
}  # fmt: skip
_CODES = {"kor": "ko", "eng": "en", "jpn": "ja", "zho": "zh", "chi": "zh", "cmn": "zh"}  # ISO 639-3
_CHINESE = {  # script or region -> tag
    "hant": "zh_tw", "tw": "zh_tw", "hans": "zh_cn", "cn": "zh_cn", "sg": "zh_cn", "my": "zh_cn",
    "hk": "zh_hk", "mo": "zh_hk",
}  # fmt: skip
_OWN_SCRIPTS = {
    "ko": ("kore", "hang"), "en": ("latn",), "ja": ("jpan", "hira", "kana"),
}  # fmt: skip
_MEANT = {
    "kr": "ko", "korean": "ko", "jp": "ja", "japanese": "ja", "english": "en", "us": "en",
    "uk": "en", "cn": "zh_cn", "tw": "zh_tw", "hk": "zh_hk", "cantonese": "zh_hk",
    "taiwanese": "zh_tw", "zh": "zh_tw or zh_cn", "chinese": "zh_tw or zh_cn",
    "mandarin": "zh_tw or zh_cn", "zho": "zh_tw or zh_cn", "cmn": "zh_tw or zh_cn",
}  # fmt: skip
SCRIPTS = (  # in wide use today
    "Han Hangul Hiragana Katakana Bopomofo Arabic Armenian Bengali Cyrillic Devanagari "
    "Ethiopic Georgian Greek Gujarati Gurmukhi Hebrew Kannada Khmer Lao Latin Malayalam "
    "Mongolian Myanmar Oriya Sinhala Syriac Tamil Telugu Thaana Thai Tibetan"
).split()
_SCRIPTS_WITHOUT_SPACES = {
    "Han", "Hiragana", "Katakana", "Bopomofo", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan",
}  # fmt: skip
_NO_SCRIPT = {"Zyyy", "Zinh", "Zzzz"}  # codes of characters that belong to all scripts or to none
_TAG_WITH_SCRIPT = regex.compile("[a-z]{2,3}[_-]([A-Z][a-z]{3})")


def find_language(tag: str) -> Language:
    """The language of a tag: a known tag in any spelling (`zh-TW`, `ko_KR`, `EN`, `zh_Hant`), or
    any language code with its script (`th_Thai`).

    The script is an ISO 15924 code, as in FLORES and BCP 47. Raises `UserError` for other tags,
    naming the known one that was probably meant.
    """
    known = find_tag(tag)
    if known is not None:
        return LANGUAGES[known]
    found = _TAG_WITH_SCRIPT.fullmatch(tag)
    scripts = _SCRIPTS_OF_CODE.get(found[1], (found[1],)) if found else ()
    if not all(map(_is_script, scripts)) or not scripts:
        meant = _MEANT.get(tag.casefold())
        if meant is None:
            close = difflib.get_close_matches(_normal(tag), LANGUAGES, n=1, cutoff=0.75)
            meant = close[0] if close else None
        if meant is not None:
            raise UserError(f"language {tag!r} is not known; use {meant}.")
        raise UserError(
            f"language {tag!r} is not known; use one of {', '.join(LANGUAGES)}, or the code of "
            "another language with its script, such as th_Thai."
        )
    return Language(tag, tag, scripts)


def find_tag(tag: str) -> str | None:
    """The known tag of a tag in any spelling, by its script or its region; None if there is none.

    `zh` alone leaves open which Chinese it is.
    """
    if tag in LANGUAGES:
        return tag
    code, *parts = _normal(tag).split("_")
    code = _CODES.get(code, code)
    if code == "yue":
        return "zh_hk"
    if code == "zh":
        ways = {_CHINESE[part] for part in reversed(parts) if part in _CHINESE}
        if "hk" in parts or "mo" in parts:  # Hant alone is Taiwan's
            ways -= {"zh_tw"}
        return ways.pop() if len(ways) == 1 else None
    regions = [part for part in parts if part not in _OWN_SCRIPTS.get(code, ())]
    if code in LANGUAGES and all(regex.fullmatch("[a-z]{2}|[0-9]{3}", part) for part in regions):
        return code
    return None


def _normal(tag: str) -> str:
    return tag.strip().casefold().replace("-", "_")


def _is_script(name: str) -> bool:
    if name in _NO_SCRIPT:
        return False
    try:
        regex.compile(rf"\p{{Script={name}}}")
    except regex.error:
        return False
    return True


@cache
def script_pattern(scripts: tuple[str, ...]) -> regex.Pattern[str]:
    """A pattern for one letter or mark of any of the scripts; without scripts it matches nothing.

    A script includes characters that it shares with few others (Script_Extensions: `ー` of the two
    Kana, Arabic vowel signs), but no accents and modifiers of Latin, no digits, no punctuation.
    """
    own = r"[\p{Script=%s}&&[\p{L}\p{M}\p{Nl}]]"  # Nl: 〇
    shared = r"[[\p{Script_Extensions=%s}&&[\p{L}\p{M}]]--[\u02B0-\u036F]]"
    parts = [own % script + shared % script for script in scripts]
    return regex.compile(f"[{''.join(parts)}]" if parts else "(?!)", regex.V1)


def script_share(text: str, scripts: tuple[str, ...]) -> float:
    """The share of a text's letters that belong to the scripts; 0 for a text without letters."""
    own, letters = 0, 0
    for character, count in Counter(text).items():
        if _is_letter(character):
            letters += count
            own += count * _is_of(character, scripts)
    return own / letters if letters else 0.0


@cache
def _is_letter(character: str) -> bool:
    return regex.match(r"\p{L}", character) is not None


@cache
def _is_of(character: str, scripts: tuple[str, ...]) -> bool:
    return script_pattern(scripts).match(character) is not None
