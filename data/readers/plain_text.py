"""Plain text: one document per line, or one per file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cpt_merge.data.readers.rows import BadRow, Row
from cpt_merge.data.readers.streams import lines, not_utf8, read_bytes


def read_lines(file: Path, fields: Sequence[str] = ()) -> Iterator[Row]:
    """The lines, which end with LF, CRLF or CR; U+2028 does not end one."""
    number = 0
    for line in lines(file):
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            number += 1
            yield number, BadRow(not_utf8(line, error))
            continue
        # where only CR ends lines, `lines` gives all of them at once
        for part in text.removesuffix("\n").removesuffix("\r").split("\r"):
            number += 1
            yield number, part


def read_whole(file: Path, fields: Sequence[str] = ()) -> Iterator[Row]:
    """The file as one document; its lines end with LF."""
    content = read_bytes(file)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield 1, BadRow(not_utf8(content, error))
    else:
        yield 1, text.replace("\r\n", "\n").replace("\r", "\n")
