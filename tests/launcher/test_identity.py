"""Ids in W&B: the same after every resume, never those of another result."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.launcher.identity import IDS_FILE, group_name, run_id
from cpt_merge.tracking import TrackingConfig, start_tracker


def log(out: Path, stage: str, key: str, mode: str = "disabled", value: float = 0.0) -> str:
    """Log as a stage does. Returns the id."""
    group = group_name("demo", out)
    name = run_id(out, group, stage, key, out / stage / "log")
    config = TrackingConfig.model_validate({"mode": mode})
    tracker = start_tracker(config, stage, f"demo-{stage}", group, out / stage / "log", {}, name)
    for layer in range(3):
        tracker.log({"merge/layer": layer, "merge/norm": value + layer})
    tracker.finish()
    return name


def test_a_resumed_stage_has_its_id(tmp_path: Path) -> None:
    name = log(tmp_path, "training", "0123456789")
    assert re.fullmatch(r"demo-[0-9a-f]{6}-training-01234567", name)
    assert [log(tmp_path, "training", "0123456789") for _ in range(2)] == [name, name]
    assert log(tmp_path, "training", "abcdef0123") == name.replace("01234567", "abcdef01")


def test_a_folder_that_was_removed_and_made_anew_is_another_group(tmp_path: Path) -> None:
    before = group_name("demo", tmp_path / "demo")
    assert group_name("demo", tmp_path / "demo") == before
    shutil.rmtree(tmp_path / "demo")
    assert group_name("demo", tmp_path / "demo") != before


def test_a_folder_that_was_moved_keeps_its_group(tmp_path: Path) -> None:
    before = group_name("demo", tmp_path / "runs" / "demo")
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    assert group_name("demo", tmp_path / "elsewhere" / "demo") == before


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / IDS_FILE).write_text("{")
    with pytest.raises(UserError, match=r"wandb.json is damaged; remove it"):
        group_name("demo", tmp_path)
