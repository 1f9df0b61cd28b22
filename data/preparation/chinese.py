"""Conversion between Traditional and Simplified Chinese, and between regional words (OpenCC)."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

Conversion = Literal[
    "s2t", "s2tw", "s2twp", "s2hk", "s2hkp", "t2tw", "t2hk", "tw2t", "hk2t", "jp2t",
    "t2s", "tw2s", "tw2sp", "hk2s", "hk2sp", "t2jp",
]  # fmt: skip
STEP = "converted"
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
    # OpenCC ends at a NUL
    return "\0".join(converter.convert(part) for part in text.split("\0"))


@cache
def _converter(conversion: str) -> Any:
    import opencc  # 7 ms, and more for its dictionaries

    return opencc.OpenCC(conversion)
