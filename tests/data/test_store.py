"""Opening a token store: a damaged or unsuitable one is an error."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.data.packing import TrainingSequences
from cpt_merge.data.store import SplitWriter, Store


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    return shutil.copytree(store, tmp_path / "copy")


def first_folder(store: Path) -> Path:
    return store / Store.open(store).info.sources[0].folder / "train"


def test_counts_are_in_store_json(store: Path) -> None:
    opened = Store.open(store)
    for info in opened.info.sources:
        documents = opened.documents(info, "train")
        assert info.train.documents == len(documents)
        assert info.train.tokens == documents.starts[-1] == len(documents.tokens)
        assert info.train.bytes == documents.bytes.sum()
        assert info.train.largest == documents.tokens.max()


def test_a_store_of_another_tokenizer_is_refused(store: Path, tmp_path: Path, model: Path) -> None:
    other = tmp_path / "tokenizer.json"
    other.write_text((model / "tokenizer.json").read_text() + " ")
    with pytest.raises(UserError, match="made with another tokenizer"):
        Store.open(store).check_tokenizer(tmp_path)


def test_a_store_with_tokens_that_the_model_lacks_is_refused(store: Path) -> None:
    opened = Store.open(store)
    largest = max(max(info.train.largest, info.heldout.largest) for info in opened.info.sources)
    opened.check_vocabulary(largest + 1)
    with pytest.raises(
        UserError, match=rf"contains token {largest} in .* but the model has {largest} rows"
    ):
        opened.check_vocabulary(largest)


def test_a_truncated_token_file_is_refused(copy: Path) -> None:
    opened, path = Store.open(copy), first_folder(copy) / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"tokens\.bin has"):
        opened.documents(opened.info.sources[0], "train")


@pytest.mark.parametrize("name", ["starts.npy", "bytes.npy"])
def test_a_damaged_index_is_refused(copy: Path, name: str) -> None:
    opened, path = Store.open(copy), first_folder(copy) / name
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged"):
        opened.documents(opened.info.sources[0], "train")
    path.unlink()
    with pytest.raises(UserError, match="is damaged"):
        opened.documents(opened.info.sources[0], "train")
    np.save(path, np.zeros(3, np.int64))
    with pytest.raises(UserError, match="does not have"):
        opened.documents(opened.info.sources[0], "train")


def test_tokens_that_were_not_written_are_found_when_they_are_read(copy: Path) -> None:
    path = first_folder(copy) / "tokens.bin"
    path.write_bytes(b"\xff" * path.stat().st_size)
    rows = TrainingSequences(Store.open(copy), 32, 0, [1.0, 1e-6])
    with pytest.raises(UserError, match=r"contains token 65535, but \d+ was the largest"):
        rows.batch(range(8))


def test_a_store_json_that_is_none_is_refused(copy: Path) -> None:
    path = copy / "store.json"
    values = json.loads(path.read_text())
    for content in (path.read_text()[:-20], json.dumps({**values, "sources": [{}]}), "[]"):
        path.write_text(content)
        with pytest.raises(UserError, match=r"store\.json cannot be read"):
            Store.open(copy)
    path.unlink()
    with pytest.raises(UserError, match="does not exist; run `cpt-merge data RECIPE` first"):
        Store.open(copy)


def test_less_text_than_a_batch_is_refused(store: Path) -> None:
    rows = TrainingSequences(Store.open(store), 128, 0)
    filled = sum(packed.sequences for packed in rows.sources)
    rows.check_batch(filled)
    with pytest.raises(
        UserError,
        match=rf"fills {filled} sequences of 128 tokens, fewer than training.global_batch_size",
    ):
        rows.check_batch(filled + 1)


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    """On Linux every write to /dev/full fails as on a full disk; the launcher makes a sentence of it."""
    (tmp_path / "tokens.bin").symlink_to("/dev/full")
    writer = SplitWriter(tmp_path, "uint16")
    with pytest.raises(OSError, match="No space left"):
        writer.add(np.ones(100_000, np.uint16), np.asarray([100_000]), np.asarray([1]))
