"""JSON: one record per line, or one value for the whole file."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from cpt_merge.core.errors import UserError
from cpt_merge.data.readers.rows import BadRow, Row
from cpt_merge.data.readers.streams import lines, not_utf8, read_bytes

_SURROGATE = "contains a lone surrogate, which is not Unicode text"
_DIGITS = 4000  # of a number; Python refuses to read longer ones


def read_json(file: Path, fields: Sequence[str] = ()) -> Iterator[Row]:
    """The records of a file, numbered by line, or by their place in an array.

    An array may also contain the texts themselves. Raises `UserError` for a damaged file.
    """
    first = True
    for number, line in enumerate(lines(file), start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        if first and (whole := _whole_file(file, line)) is not None:
            yield from whole
            return
        first = False
        yield number, _record(line)


def _whole_file(file: Path, line: bytes) -> Iterator[Row] | None:
    """The records of a file that is one value; None for one of which every line is a value.

    `line` is the first one that is not blank.
    """
    start = line.lstrip()[:1]
    if start != b"[" and not (start == b"{" and isinstance(_record(line), BadRow)):
        return None
    try:
        value = _without_surrogates(_parse(read_bytes(file)))
    except (UserError, ValueError) as error:
        if start == b"{":  # a broken line, unless the whole file was one object
            return None
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} {error}; fix it, or write one record per line.") from None
    elements = value if isinstance(value, list) else [value]
    return ((number, _checked(element)) for number, element in enumerate(elements, start=1))


def _checked(value: Any) -> Any:
    return (
        value if isinstance(value, dict | str | BadRow) else BadRow("is neither an object nor text")
    )


def _record(line: bytes) -> Any:
    try:
        value = orjson.loads(line)
    except ValueError:
        try:
            value = _without_surrogates(_parse(line.rstrip()))
        except ValueError as error:
            return BadRow(str(error))
    return value if isinstance(value, dict) else BadRow("is not a JSON object")


def _number(digits: str) -> int | float:
    return int(digits) if len(digits) <= _DIGITS else float(digits)


def _without_surrogates(value: Any) -> Any:
    """The value, in which texts that are not Unicode are `BadRow`s."""
    if isinstance(value, dict):
        return {_name(key): _without_surrogates(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_surrogates(one) for one in value]
    if isinstance(value, str) and _name(value) != value:
        return BadRow(_SURROGATE)
    return value


def _name(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def parse_json(content: bytes | str) -> Any:
    """The value of UTF-8 text, also with NaN and long numbers, which orjson refuses.

    Raises `ValueError` with a sentence's end that says what is wrong: "is not UTF-8".
    """
    value = _parse(content)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(_SURROGATE) from None
    return value


def _parse(content: bytes | str) -> Any:
    """As `parse_json`, but a text may contain half a surrogate pair."""
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        return json.loads(text, parse_int=_number)
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(error.object, error)) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg}: character {error.pos + 1})") from None
    except RecursionError:
        raise ValueError("is not JSON that can be read (too deeply nested)") from None
