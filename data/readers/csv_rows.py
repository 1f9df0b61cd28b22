"""CSV and TSV with a header line. Every cell is text, also `NA`, `null` and numbers."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from cpt_merge.core.errors import UserError
from cpt_merge.data.readers.rows import BadRow, Row
from cpt_merge.data.readers.streams import LONGEST_LINE, lines, not_utf8

_TAB = "\t"
_DELIMITERS = (",", ";", _TAB, "|")


def read_csv(file: Path, fields: Sequence[str] = ()) -> Iterator[Row]:
    """The rows, numbered by their first lines. Raises `UserError` for wrong quotation marks."""
    return _read(file, fields, ",")


def read_tsv(file: Path, fields: Sequence[str] = ()) -> Iterator[Row]:
    """As `read_csv`, with tabs between the cells."""
    return _read(file, fields, _TAB)


def _read(file: Path, fields: Sequence[str], delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_LINE)
    # strict: otherwise a quotation mark without its partner takes the rest of the file
    rows = csv.reader(_decoded(file), delimiter=delimiter, strict=True)
    header, start = list[str](), 1
    try:
        for cells in rows:
            number, start = start, rows.line_num + 1
            if not cells:
                continue
            if not header:
                header = _checked(file, cells, fields, delimiter)
            elif len(cells) == len(header):
                yield number, dict(zip(header, cells, strict=True))
            else:
                yield number, BadRow(f"has {len(cells)} cells, but the header has {len(header)}")
    except csv.Error as error:
        reason = (
            "a CR without LF outside quotation marks" if "new-line" in str(error) else str(error)
        )
        raise UserError(f"{file}: line {start} is not CSV ({reason}); fix it.") from None


def _checked(file: Path, header: list[str], fields: Sequence[str], delimiter: str) -> list[str]:
    other = _other_delimiter(header, fields, delimiter)
    if other:
        remedy = "convert it, or name it .tsv" if other == _TAB else "convert it"
        raise UserError(
            f"{file}: its cells are separated by {other!r} and not by {delimiter!r}; {remedy}."
        )
    twice = [name for name in fields if header.count(name) > 1]
    if twice:
        raise UserError(f"{file} has more than one column {twice[0]!r}; rename one.")
    return header


def _other_delimiter(header: list[str], fields: Sequence[str], delimiter: str) -> str | None:
    """The delimiter with which the header, which has no field, would have one."""
    if set(header) & set(fields):
        return None
    line = delimiter.join(header)
    return next((other for other in _DELIMITERS if set(line.split(other)) & set(fields)), None)


def _decoded(file: Path) -> Iterator[str]:
    for number, line in enumerate(lines(file), start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: line {number} {not_utf8(line, error)}; convert it.") from None
