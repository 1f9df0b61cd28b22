"""Parquet and Arrow: only what is needed is read, and JSON in them is never taken for text."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.data.readers import arrow_tables
from cpt_merge.data.readers.arrow_tables import read_arrow, read_parquet
from cpt_merge.data.readers.rows import BadRow

RECORDS: list[dict[str, Any]] = [
    {"text": "가나", "doc": {"text": "x", "n": 1}, "id": 1},
    {"text": None, "doc": None, "id": 2},
    {"text": "天", "doc": {"text": "y", "n": 2}, "id": 3},
]


def write(directory: Path, table: pyarrow.Table) -> dict[str, Path]:
    files = {name: directory / f"{name}.arrow" for name in ("parquet", "stream", "file")}
    pyarrow.parquet.write_table(table, files["parquet"], row_group_size=2)
    for name, new in (("stream", pyarrow.ipc.new_stream), ("file", pyarrow.ipc.new_file)):
        with new(files[name], table.schema) as writer:
            writer.write_table(table)
    return files


def rows(files: dict[str, Path], *fields: str) -> dict[str, list[Any]]:
    readers = {"parquet": read_parquet, "stream": read_arrow, "file": read_arrow}
    return {name: list(readers[name](file, fields)) for name, file in files.items()}


def test_only_the_needed_columns_have_values(tmp_path: Path) -> None:
    files = write(tmp_path, pyarrow.Table.from_pylist(RECORDS))
    for read in rows(files, "text").values():
        assert read == [
            (number, {"text": record["text"], "doc": None, "id": None})
            for number, record in enumerate(RECORDS, start=1)
        ]
    for read in rows(files, "doc.text").values():
        assert [row["doc"] for _, row in read] == [record["doc"] for record in RECORDS]
    for read in rows(files, "absent").values():
        assert [list(row) for _, row in read] == 3 * [["doc", "id", "text"]] or len(read) == 3


def test_batches_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_tables, "BATCH_BYTES", 4000)
    texts = [100 * str(number % 10) for number in range(200)]
    files = write(tmp_path, pyarrow.table({"text": texts}))
    for read in rows(files, "text").values():
        assert [(number, row["text"]) for number, row in read] == list(enumerate(texts, start=1))
    assert arrow_tables.rows_at_once(300_000_000, 300) == 1


def test_json_that_datasets_wrote_for_mixed_types_is_read_as_what_it_was(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text('{"text": "가나"}\n{"text": 3}\n{"text": null}\n')
    mixed = datasets.load_dataset(
        "json", data_files=str(tmp_path / "a.jsonl"), split="train", cache_dir=str(tmp_path / "c")
    )
    mixed.to_parquet(str(tmp_path / "a.parquet"))
    mixed.save_to_disk(str(tmp_path / "saved"))
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    for read in (read_parquet(tmp_path / "a.parquet", ["text"]), read_arrow(arrow, ["text"])):
        assert [row["text"] for _, row in read if isinstance(row, dict)] == ["가나", 3, None]


def test_text_that_is_not_utf8_is_a_bad_value_of_its_row(tmp_path: Path) -> None:
    broken = pyarrow.array([b"x", b"\xb0\xa1", b"y"]).view(pyarrow.string())
    for read in rows(write(tmp_path, pyarrow.table({"text": broken})), "text").values():
        assert [row["text"] for _, row in read] == ["x", BadRow("is not UTF-8"), "y"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    files = write(tmp_path, pyarrow.Table.from_pylist(RECORDS))
    for name, file in files.items():
        file.write_bytes(file.read_bytes()[:-20] if name != "stream" else b"no arrow")
        with pytest.raises(UserError, match=rf"{name}\.arrow cannot be read as"):
            rows({name: file}, "text")


def test_a_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    twice = pyarrow.table([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["text", "text"])
    for name, file in write(tmp_path, twice).items():
        with pytest.raises(UserError, match=r"has more than one column 'text'; rename one"):
            rows({name: file}, "text")
