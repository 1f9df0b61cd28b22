"""Artifacts: nothing half-written is seen, and keys change with what they are keys of."""

import os
import time
from pathlib import Path

import pytest

from cpt_merge.core.artifact import (
    StageRecord,
    fingerprint,
    new_directory,
    read_json_lines,
    read_record,
    stage_key,
    write_json_lines,
    write_record,
)
from cpt_merge.core.errors import UserError


def test_a_new_directory_takes_the_place_of_the_old_one_only_when_it_is_whole(
    tmp_path: Path,
) -> None:
    target = tmp_path / "out"
    with new_directory(target) as beside:
        (beside / "a").write_text("1")
    with pytest.raises(FileNotFoundError), new_directory(target) as beside:
        (beside / "missing" / "a").write_text("2")
    assert (target / "a").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


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
    """Training reads such tables when it resumes: text from the web holds U+2028, which is a line end to Python."""
    rows = [[1, "a\u2028b\u2029c\x85d\r\ne"], [2, "둘"]]
    write_json_lines(tmp_path / "rows.jsonl", rows)
    assert read_json_lines(tmp_path / "rows.jsonl") == rows
    assert read_json_lines(tmp_path / "none.jsonl") == []
    (tmp_path / "rows.jsonl").write_text('[1, "cut')
    with pytest.raises(UserError, match=r"rows.jsonl is damaged .*mend it, or remove it"):
        read_json_lines(tmp_path / "rows.jsonl")
