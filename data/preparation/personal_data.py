"""Patterns of personal data, which are replaced by fixed placeholders.

A number counts only if it is well formed: dates must exist, and check digits be right, where there
are any. Patterns find neither names nor addresses, and a document is not anonymous without them.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Literal

from cpt_merge.data.preparation.notes import Notes

PersonalData = Literal[
    "email", "ip_address", "phone", "kr_resident_number", "tw_id_number", "cn_id_number"
]


@dataclass(frozen=True)
class Pattern:
    """A kind of personal data. A text without any of `marks` contains none."""

    placeholder: str
    marks: str
    pattern: re.Pattern[str]
    is_valid: Callable[[str], bool] = bool


def _is_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_global


def _is_date(year: int, month: int, day: int) -> bool:
    try:
        return date(year, month, day) is not None
    except ValueError:
        return False


def _is_korean(text: str) -> bool:
    """The date of birth exists. The last digit checks nothing since October 2020."""
    digits = re.sub(r"\D", "", text)
    century = {"9": 18, "0": 18, "1": 19, "2": 19, "5": 19, "6": 19}.get(digits[6], 20)
    return _is_date(century * 100 + int(digits[:2]), int(digits[2:4]), int(digits[4:6]))


def _is_chinese(text: str) -> bool:
    """GB 11643-1999: the date of birth exists, and the last character is ISO 7064 MOD 11-2."""
    if not _is_date(int(text[6:10]), int(text[10:12]), int(text[12:14])):
        return False
    weights = [2**power % 11 for power in range(17, 0, -1)]
    total = sum(weight * int(digit) for weight, digit in zip(weights, text[:17], strict=True))
    return "10X98765432"[total % 11] == text[17].upper()


def _is_taiwanese(text: str) -> bool:
    """National ids, and since 2021 those of residents, whose second character is 8 or 9."""
    tens, units = divmod("ABCDEFGHJKLMNPQRSTUVXYWZIO".index(text[0]) + 10, 10)
    digits = [tens, units, *map(int, text[1:])]
    weights = (1, 9, 8, 7, 6, 5, 4, 3, 2, 1, 1)
    return sum(map(int.__mul__, digits, weights)) % 10 == 0


_DIGITS = "0123456789"
# not part of a longer number, word or dotted name
_START, _END = r"(?<![0-9A-Za-z_.+-])", r"(?![0-9A-Za-z_]|[.-][0-9])"


def _landline(area: str, number: str) -> str:
    return rf"(?:\({area}\)[ .-]?|{area}[ .-]){number}"


_PHONES = (
    r"\+(?:82|886|86|81|852)[ -]?(?:\(0\)|0)?[1-9]\d{0,3}(?:[ -]?\d{3,4}){1,2}\d?",
    r"01[016789][ .-]?\d{3,4}[ .-]?\d{4}",  # Korea, mobile
    _landline(r"0(?:2|[3-6][1-5]|70)", r"\d{3,4}[ .-]\d{4}"),  # Korea
    r"09\d{2}[ -]?\d{3}[ -]?\d{3}",  # Taiwan, mobile
    _landline(r"0[2-8]", r"\d{3,4}[ -]?\d{4}"),  # Taiwan
    r"1[3-9]\d[ -]?\d{4}[ -]?\d{4}",  # China, mobile
    _landline(r"0\d{2,3}", r"\d{7,8}"),  # China
    r"0[789]0-?\d{4}-?\d{4}",  # Japan, mobile
    _landline(r"0\d{1,4}", r"\d{1,4}-\d{4}"),  # Japan
)
PATTERNS: dict[PersonalData, Pattern] = {  # longer numbers first
    "email": Pattern(
        "<EMAIL>",
        "@",
        re.compile(
            r"(?<![A-Za-z0-9_.%+-])[A-Za-z0-9_][A-Za-z0-9._%+-]{0,63}@"
            r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![A-Za-z0-9-])"
        ),
    ),
    "ip_address": Pattern(
        "<IP_ADDRESS>",
        ".:",
        re.compile(
            rf"{_START}\d{{1,3}}(?:\.\d{{1,3}}){{3}}{_END}"
            r"|(?<![0-9A-Za-z_:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![0-9A-Za-z_:])",
            re.ASCII,
        ),
        _is_address,
    ),
    "cn_id_number": Pattern(
        "<CN_ID_NUMBER>",
        _DIGITS,
        re.compile(rf"{_START}[1-9]\d{{5}}(?:19|20)\d{{9}}[\dXx]{_END}", re.ASCII),
        _is_chinese,
    ),
    "kr_resident_number": Pattern(
        "<KR_RESIDENT_NUMBER>",
        "-–",
        re.compile(rf"{_START}\d{{6}} ?[-–] ?\d{{7}}{_END}", re.ASCII),
        _is_korean,
    ),
    "tw_id_number": Pattern(
        "<TW_ID_NUMBER>",
        "1289",
        re.compile(rf"{_START}[A-Z][1289]\d{{8}}{_END}", re.ASCII),
        _is_taiwanese,
    ),
    "phone": Pattern(
        "<PHONE>", _DIGITS, re.compile(f"{_START}(?:{'|'.join(_PHONES)}){_END}", re.ASCII)
    ),
}


@dataclass(frozen=True)
class Replacement:
    """Replaces personal data of some kinds."""

    kinds: tuple[PersonalData, ...]
    leaves_out: Sequence[str] = ()

    @property
    def changes(self) -> Sequence[str]:
        """See `Step`."""
        return self.kinds

    def __call__(self, text: str, notes: Notes) -> str:
        """See `Step`. Examples show the text without all that is replaced."""
        places = dict[PersonalData, int]()
        for kind, pattern in PATTERNS.items():
            if kind in self.kinds and any(mark in text for mark in pattern.marks):
                text, places[kind] = _replace(text, pattern)
        for kind, count in places.items():
            if count:
                notes.replace(kind, text, PATTERNS[kind].placeholder, count)
        return text


def _replace(text: str, pattern: Pattern) -> tuple[str, int]:
    """The text with placeholders, and how many."""
    places = 0

    def replaced(found: re.Match[str]) -> str:
        nonlocal places
        if not pattern.is_valid(found[0]):
            return found[0]
        places += 1
        return pattern.placeholder

    return pattern.pattern.sub(replaced, text), places
