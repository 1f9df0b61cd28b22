"""Readers of text files, one module per format. A reader gives the rows of a file in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpt_merge.data.readers.arrow_tables import read_arrow, read_parquet
from cpt_merge.data.readers.csv_rows import read_csv, read_tsv
from cpt_merge.data.readers.json_records import read_json
from cpt_merge.data.readers.plain_text import read_lines, read_whole
from cpt_merge.data.readers.rows import Row
from cpt_merge.data.readers.streams import COMPRESSIONS

Reader = Callable[[Path, Sequence[str]], Iterator[Row]]  # (file, the fields that are needed)


@dataclass(frozen=True)
class Format:
    """A kind of file. `unit` is what its rows are called in messages."""

    read: Reader
    unit: str


FORMATS = {
    ".jsonl": Format(read_json, "line"),
    ".ndjson": Format(read_json, "line"),
    ".json": Format(read_json, "record"),
    ".parquet": Format(read_parquet, "row"),
    ".arrow": Format(read_arrow, "row"),
    ".csv": Format(read_csv, "line"),
    ".tsv": Format(read_tsv, "line"),
    ".txt": Format(read_lines, "line"),
}
WHOLE_FILES = dict.fromkeys((".txt", ".md", ".markdown"), Format(read_whole, "document"))


def endings(file: Path) -> tuple[str, str]:
    """The endings of a name that say how a file is read: of its format, of its compression."""
    suffixes = [suffix.lower() for suffix in file.suffixes[-2:]]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return suffixes[-1] if suffixes else "", compression


def format_of(file: Path, whole_files: bool = False) -> Format | None:
    """The format by the ending of the name, before that of a compression; None if unknown.

    With `whole_files`, only files that are one document each have a format.
    """
    return (WHOLE_FILES if whole_files else FORMATS).get(endings(file)[0])
