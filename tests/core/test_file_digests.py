"""A digest follows the content of a file, and a file is read once."""

import os
import time
from pathlib import Path

import pytest

from cpt_merge.core import file_digests
from cpt_merge.core.artifact import fingerprint
from cpt_merge.core.file_digests import file_digest, known_digests, recall_digests


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_digests, "_known", {})


def make_old(path: Path, seconds: float = 60) -> None:
    """Give a file an earlier modification time, as if it had been written then."""
    then = time.time() - seconds
    os.utime(path, (then, then))


@pytest.mark.parametrize("name", ["text.jsonl", "model.safetensors"])
@pytest.mark.parametrize("size", [10, 100])
def test_a_touch_changes_nothing_and_an_edit_does(
    name: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of at most 50 bytes count as small here; of larger weights all bytes are sampled."""
    monkeypatch.setattr(file_digests, "SMALL", 50)
    monkeypatch.setattr(file_digests, "SAMPLE", 2)
    path = tmp_path / name
    path.write_bytes(b"a" * size)
    make_old(path)
    first = file_digest(path)
    make_old(path, seconds=30)
    assert file_digest(path) == first
    path.write_bytes(b"a" * (size - 1) + b"b")
    assert file_digest(path) != first


def test_a_file_that_is_known_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("1")
    make_old(path)
    first, kept = file_digest(path), known_digests()
    monkeypatch.setattr(file_digests, "_known", {})
    recall_digests(kept)
    monkeypatch.setattr(file_digests, "_read", lambda *_: pytest.fail("it is read"))
    assert file_digest(path) == first


def test_a_file_that_was_just_written_may_change_within_its_modification_time(
    tmp_path: Path,
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("1")
    first, stat = file_digest(path), path.stat()
    path.write_text("2")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_digest(path) != first


def test_what_cannot_be_recalled_is_read_again(tmp_path: Path) -> None:
    recall_digests("no json")
    recall_digests('{"/a": 1}')
    (tmp_path / "a").write_text("1")
    assert file_digest(tmp_path / "a") == file_digest(tmp_path / "a")


def test_the_notes_of_the_hub_client_are_no_part_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "config.json.metadata").write_text("downloaded today")
    assert fingerprint(tmp_path) == before
