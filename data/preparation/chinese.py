"""Conversion between Traditional and Simplified Chinese, and between regional words (OpenCC)."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, Literal

Conversion = Literal[
    "s2t", "s2tw", "s2twp", "s2hk", "s2hkp", "t2tw", "t2hk", "tw2t", "hk2t", "jp2t",
    "t2s", "tw2s", "tw2sp", "hk2s", "hk2sp", "t2jp",
]  # fmt: skip
STEP = "converted"
_STRETCH = 1 << 20  # characters that are converted at a time
_SIMPLIFIED = {"t2s", "tw2s", "tw2sp", "hk2s", "hk2sp"}


def check_conversion(conversion: Conversion, language: str) -> None:
    """Raise `ValueError` if the result is not in the language."""
    if conversion == "t2jp":
        fits = language.startswith("ja")
    elif conversion in _SIMPLIFIED:
        fits = language == "zh_cn" or language.endswith(("_Hans", "-Hans", "_Hani", "-Hani"))
    else:
        fits = language in ("zh_tw", "zh_hk") or language.endswith(
            ("_Hant", "-Hant", "_Hani", "-Hani")
        )
    if not fits:
        raise ValueError(f"`convert: {conversion}` does not give text in {language}")


def convert(text: str, conversion: str) -> str:
    """The converted text; what is not Chinese stays as it is."""
    converter = _converter(conversion)
    if len(text) <= _STRETCH and "\0" not in text:
        return str(converter.convert(text))
    # OpenCC ends at a NUL, and needs nine times as much memory as the text
    return "".join(
        part if part == "\0" else converter.convert(part) for part in _parts(_STRETCH).findall(text)
    )


@cache
def _parts(length: int) -> re.Pattern[str]:
    """NULs, and what is between them in parts of up to `length`, which end with lines."""
    return re.compile(rf"\0|[^\0]{{0,{length - 1}}}\n|[^\0]{{1,{length}}}")


@cache
def _converter(conversion: str) -> Any:
    import opencc  # 7 ms, and more for its dictionaries

    return opencc.OpenCC(conversion)
