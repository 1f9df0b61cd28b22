"""The documents of one file: rows to texts, with the place of everything that is wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cpt_merge.core.errors import UserError
from cpt_merge.core.foreign_formats import refuse_pointer
from cpt_merge.data.readers import FORMATS, format_of
from cpt_merge.data.readers.arrow_tables import parquet_rows
from cpt_merge.data.readers.rows import BadRow, Record, Row
from cpt_merge.data.records import TextOf

_SHOWN = 4  # fields in a message
SKIPPED = None  # stands for a bad row that is left out


@dataclass(frozen=True)
class Layout:
    """How the documents of a source are in its files."""

    text_of: TextOf
    whole_files: bool = False
    skip_bad_rows: bool = False


def read_documents(file: Path, layout: Layout, most: int | None = None) -> Iterator[str | None]:
    """Every document; "" for one without text, `SKIPPED` for a bad row that is to be left out.

    With `most`, as if the file ended after so many rows. Raises `UserError` with file and row for
    what cannot be read, and for a file none of whose records has the field.
    """
    rows, unit = read_rows(file, layout)
    yield from documents_of(islice(rows, most), f"{file}: {unit}", layout)


def read_records(file: Path, layout: Layout) -> Iterator[Record]:
    """The rows that are records, as they are in the file."""
    rows, _ = read_rows(file, layout)
    return (record for _, record in rows if isinstance(record, dict))


def read_rows(file: Path, layout: Layout) -> tuple[Iterator[Row], str]:
    """The rows of a file, and what they are called in messages."""
    found = format_of(file, layout.whole_files)
    if found is None:
        endings = ".txt or .md" if layout.whole_files else ", ".join(FORMATS)
        raise UserError(f"{file}: its ending is none of {endings} (also compressed); convert it.")
    refuse_pointer(file)
    return found.read(file, layout.text_of.fields), found.unit


def count_rows(files: Iterable[Path], layout: Layout) -> int:
    """The number of documents in files, empty and bad ones included."""
    return sum(
        parquet_rows(file)
        if file.suffix == ".parquet"
        else sum(1 for _ in read_documents(file, layout))
        for file in files
    )


def known_rows(files: Sequence[Path]) -> int | None:
    """The number of rows of files that tell it without being read; None if one does not."""
    told = all(file.suffix == ".parquet" for file in files)
    return sum(map(parquet_rows, files)) if told else None


def documents_of(rows: Iterable[Row], where: str, layout: Layout) -> Iterator[str | None]:
    """As `read_documents`; `where` stands before the number of a row in messages."""
    first_without, any_with = "", False
    for number, record in rows:
        text = record if isinstance(record, str | BadRow) else layout.text_of(record)
        if isinstance(text, str):
            any_with = True
            yield text
        elif text is None:
            first_without = first_without or _without(f"{where} {number}", record, layout)
            yield ""
        elif layout.skip_bad_rows:
            yield SKIPPED
        else:
            remedy = "`bad_rows: skip`" if text is record else "`field` or `bad_rows: skip`"
            raise UserError(
                f"{where} {number} {text.reason}; fix it, or set the source's {remedy}."
            )
    if first_without and not any_with:
        raise UserError(f"{first_without}; set the source's `field` or `conversations`.")


def _without(row: str, record: Any, layout: Layout) -> str:
    wanted, there = layout.text_of.fields, ", ".join(record) or "none"
    fields = ", ".join(map(repr, wanted[:_SHOWN])) + (", ..." if len(wanted) > _SHOWN else "")
    return (
        f"{row} has {'no field' if len(wanted) == 1 else 'none of the fields'} {fields} but {there}"
    )
