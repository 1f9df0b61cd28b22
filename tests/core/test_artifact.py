"""Invariant "nothing half-written": staged directories, kept results; keys and fingerprints."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpt_merge.core import artifact
from cpt_merge.core.artifact import (
    KeptLines,
    StageRecord,
    Staging,
    fingerprint,
    read_json_lines,
    read_record,
    stage_key,
    write_json_lines,
    write_record,
)
from cpt_merge.core.errors import UserError


def test_a_directory_takes_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(FileNotFoundError), Staging(target).filling() as folder:
        (folder / "missing" / "a").write_text("1")
    assert os.listdir(tmp_path) == []
    with Staging(target).filling() as folder:
        (folder / "a").write_text("2")
        assert not target.exists()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(target) == ["a"]


def test_unfinished_work_continues_with_the_same_key_alone(tmp_path: Path) -> None:
    def begin(key: str) -> bool:
        return Staging(tmp_path / "out", key).begin()

    assert not begin("1")
    (tmp_path / "out.tmp" / "a").touch()
    assert begin("1")
    assert not begin("2")
    assert not (tmp_path / "out.tmp" / "a").exists()
    assert not begin("")
    assert not begin(""), "work without a key always starts over"


def test_others_see_a_directory_when_it_is_prepared(tmp_path: Path) -> None:
    staging = Staging(tmp_path / "out", "key")
    seen = []
    staging.begin(lambda: seen.append(staging.is_begun))
    assert seen == [False]
    assert staging.is_begun


@pytest.mark.parametrize("name", ["out", "out.tmp"])
def test_what_belongs_to_others_is_never_removed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").touch()
    with pytest.raises(UserError, match=r"exists and is not empty|is in the way"):
        Staging(tmp_path / "out").begin()
    assert (tmp_path / name / "mine").exists()


def test_a_finished_directory_is_replaced_only_on_request(tmp_path: Path) -> None:
    for content in ("1", "2"):
        with Staging(tmp_path / "out", replace=True).filling() as folder:
            (folder / content).touch()
    assert os.listdir(tmp_path / "out") == ["2"]


def test_killed_in_any_step_of_a_commit_the_work_continues_or_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def attempt(lives: int) -> None:
        """Make the directory; die at the given operation on files."""

        def counted(operation: Callable[..., None]) -> Callable[..., None]:
            def run(*arguments: Any, **named: Any) -> None:
                nonlocal lives
                lives -= 1
                if lives < 0:
                    raise Killed
                operation(*arguments, **named)

            return run

        staging = Staging(tmp_path / "out", "key", scratch=("part-*",))
        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (Path, "unlink"), (artifact, "fsync")):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            staging.finish_commit()
            if (staging.target / "a").exists():
                return
            staging.begin()
            for name in ("a", "part-1"):
                (staging.directory / name).touch()
            staging.commit()

    for lives in range(40):
        with contextlib.suppress(Killed):
            attempt(lives)
        whole = (tmp_path / "out").exists()
        assert not (whole and (tmp_path / "out.tmp").exists())
        if whole:
            assert (tmp_path / "out" / "a").exists()
            Staging(tmp_path / "out", "key", scratch=("part-*",)).finish_commit()
            assert os.listdir(tmp_path) == ["out"]
            assert os.listdir(tmp_path / "out") == ["a"]
            shutil.rmtree(tmp_path / "out")


def test_kept_results_are_read_back_without_a_line_that_was_cut_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = KeptLines(tmp_path / "folder" / "kept.jsonl")
    assert kept.read() == {}
    kept.add("1", {"text": "a\u2028b"})
    with kept.path.open("a") as file:
        file.write('{"key": "cut sho')
    kept.add("2", {"n": 1})
    kept.add("2", {"n": 2})
    assert kept.read() == {"1": {"text": "a\u2028b"}, "2": {"n": 2}}
    assert "cut short" in capsys.readouterr().err
    kept.clear()
    assert kept.read() == {}


def test_a_record_is_read_back_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    written = write_record(
        tmp_path,
        StageRecord("data", "key", {"a": 1}, {"b": "c"}, results={"n": 2}),
        time.time() - 1,
    )
    assert read_record(tmp_path) == written
    assert written.seconds >= 1
    (tmp_path / "stage.json").write_text("{")
    with pytest.raises(UserError, match=r"stage\.json cannot be read"):
        read_record(tmp_path)


def test_keys_change_with_configuration_and_inputs() -> None:
    keys = {stage_key("data", {"a": a}, {"text": text}) for a in (1, 2) for text in ("x", "y")}
    assert len(keys) == 4
    assert stage_key("data", {"a": 1, "b": 2}, {}) == stage_key("data", {"b": 2, "a": 1}, {})


def test_fingerprints_change_with_content_names_and_stage_keys(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    seen = [fingerprint(tmp_path)]
    (tmp_path / "a").write_text("2")
    seen.append(fingerprint(tmp_path))
    (tmp_path / "a").rename(tmp_path / "b")
    seen.append(fingerprint(tmp_path))
    write_record(tmp_path, StageRecord("data", "0123", {}, {}), time.time())
    seen.append(fingerprint(tmp_path))
    assert len(set(seen)) == 4
    assert seen[-1] == "stage:0123"
    assert fingerprint("org/model") == "hub:org/model"


def test_rows_with_any_line_end_within_are_read_back(tmp_path: Path) -> None:
    """Text from the web holds U+2028, which ends a line for Python, but not in these files."""
    rows = [[1, "a\u2028b\u2029c\x85d\r\ne"], [2, "둘"]]
    write_json_lines(tmp_path / "rows.jsonl", rows)
    assert read_json_lines(tmp_path / "rows.jsonl") == rows
    assert read_json_lines(tmp_path / "none.jsonl") == []
    (tmp_path / "rows.jsonl").write_text('[1, "cut')
    with pytest.raises(UserError, match=r"rows.jsonl is damaged .*fix it, or remove it"):
        read_json_lines(tmp_path / "rows.jsonl")
