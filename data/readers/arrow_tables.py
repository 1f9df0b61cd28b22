"""Parquet and Arrow files. Only the needed columns are read, in batches bounded in bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpt_merge.core.errors import UserError
from cpt_merge.data.readers.rows import BadRow, Row

BATCH_BYTES = 1 << 24
MOST_ROWS = 1000
_JSON = "extension<arrow.json"


def read_parquet(file: Path, fields: Sequence[str] = ()) -> Iterator[Row]:
    """The rows. Raises `UserError` for a damaged file."""
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    with _arrow_errors(file, "Parquet"), parquet.ParquetFile(file, pre_buffer=False) as opened:
        names, columns = _columns(file, opened.schema_arrow, fields)
        number = 0
        for group in range(opened.num_row_groups):
            about = opened.metadata.row_group(group)
            rows = rows_at_once(about.total_byte_size, about.num_rows)
            for batch in opened.iter_batches(rows, [group], columns, use_threads=False):
                yield from _rows(batch, names, number)
                number += batch.num_rows


def read_arrow(file: Path, fields: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of an IPC stream, as `datasets` writes it, or an IPC file (Feather)."""
    import pyarrow

    with _arrow_errors(file, "Arrow"), pyarrow.memory_map(str(file)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        opened = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source)
        names, columns = _columns(file, opened.schema, fields)
        batches = map(opened.get_batch, range(opened.num_record_batches)) if is_file else opened
        number = 0
        for whole in batches:
            for start in range(
                0, whole.num_rows, rows := rows_at_once(whole.nbytes, whole.num_rows)
            ):
                batch = whole.select(columns).slice(start, rows)
                yield from _rows(batch, names, number)
                number += batch.num_rows


def parquet_rows(file: Path) -> int:
    """The number of rows of a Parquet file."""
    import pyarrow.parquet as parquet

    with _arrow_errors(file, "Parquet"):
        return int(parquet.read_metadata(file).num_rows)


def column_bytes(file: Path, fields: Sequence[str]) -> int:
    """The bytes of the needed columns of a Parquet file, decompressed."""
    import pyarrow.parquet as parquet

    with _arrow_errors(file, "Parquet"), parquet.ParquetFile(file) as opened:
        _, columns = _columns(file, opened.schema_arrow, fields)
        groups = [opened.metadata.row_group(group) for group in range(opened.num_row_groups)]
        chunks = (group.column(place) for group in groups for place in range(group.num_columns))
        return sum(
            chunk.total_uncompressed_size
            for chunk in chunks
            if chunk.path_in_schema.partition(".")[0] in columns
        )


def _columns(file: Path, schema: Any, fields: Sequence[str]) -> tuple[list[str], list[str]]:
    """(all columns, those that contain the fields).

    `doc.text` is a column, or a part of the column `doc`. If no column contains a field, the first
    one is read, so that there are rows.
    """
    names = schema.names
    wanted = {field if field in names else field.partition(".")[0] for field in fields}
    columns = [name for name in names if name in wanted] or names[:1]
    for name in columns:
        if columns.count(name) > 1:
            raise UserError(f"{file} has more than one column {name!r}; rename one.")
        kind = str(schema.field(name).type)
        if "arrow.json" in kind and not kind.startswith(_JSON):
            raise UserError(
                f"{file}: column {name!r} contains JSON in a list or an object; convert it."
            )
    return names, columns


def rows_at_once(size: int, rows: int) -> int:
    """How many of `rows` rows of `size` bytes are read at a time."""
    return max(1, min(MOST_ROWS, rows * BATCH_BYTES // max(size, 1)))


def _rows(batch: Any, names: list[str], before: int) -> Iterator[Row]:
    """Rows as dictionaries. Columns that were not read are in them without values, for messages."""
    unread = dict.fromkeys(name for name in names if name not in batch.schema.names)
    columns = [_values(column) for column in batch.columns]
    for number, values in enumerate(zip(*columns, strict=True), start=before + 1):
        yield number, unread | dict(zip(batch.schema.names, values, strict=True))


def _values(column: Any) -> list[Any]:
    """A column's values; a `BadRow` for text that is not UTF-8, which readers do not check."""
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = [_value(scalar) for scalar in column]
    # datasets writes values of several types as JSON, in which text is in quotation marks
    is_json = str(column.type).startswith(_JSON)
    return (
        [value if value is None else json.loads(value) for value in values] if is_json else values
    )


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return BadRow("is not UTF-8")


@contextmanager
def _arrow_errors(file: Path, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(f"{file} cannot be read as {kind} ({reason}); get it again.") from error
