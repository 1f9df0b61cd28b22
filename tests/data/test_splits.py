"""Slices of splits, row for row as `datasets` takes them."""

from pathlib import Path

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.data.sources import Source, read_source
from cpt_merge.data.splits import SplitPart, parse_split


@pytest.mark.parametrize(
    "split",
    ["train", "test", "train[:10%]", "train[33%:66%]", "train[95%:]", "train[2:5]", "train[35:]",
     "train+test", "test[:2]+train[:1]", "train[:1000]"],
)  # fmt: skip
def test_the_rows_are_those_that_datasets_takes(tmp_path: Path, split: str) -> None:
    datasets = pytest.importorskip("datasets")
    for name, rows in (("train", 37), ("test", 5)):
        lines = (f'{{"text": "{name} {row}"}}\n' for row in range(rows))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    both = datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))
    both.save_to_disk(str(tmp_path / "saved"), num_shards={"train": 3, "test": 1})
    expected = datasets.load_dataset(
        "json", data_files=files, split=split, cache_dir=str(tmp_path / "cache")
    )
    source = Source(path=str(tmp_path / "saved"), language="en", split=split)
    assert list(read_source(source)) == expected["text"][:]


def test_another_notation_is_refused() -> None:
    assert parse_split("a + b[:3]") == [SplitPart("a"), SplitPart("b", "", "3")]
    for split in ("train[-10:]", "train[:x]", "", "train[1:2:3]"):
        with pytest.raises(ValueError, match=r"is not like train, train\[:10%\]"):
            parse_split(split)


def test_plain_files_have_no_other_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("1\n2\n3\n4\n")
    source = Source(path=str(tmp_path), language="en", split="train[50%:]")
    assert list(read_source(source)) == ["3", "4"]
    with pytest.raises(UserError, match="has no splits, so no 'test'"):
        list(read_source(source.model_copy(update={"split": "test"})))
