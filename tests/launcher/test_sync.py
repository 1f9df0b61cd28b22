"""`cpt-merge sync`: which logs it is let to. What it uploads is tested in tests/tracking."""

from __future__ import annotations

from pathlib import Path

import pytest

import cpt_merge.tracking.upload
from cpt_merge.core.artifact import write_json
from cpt_merge.core.errors import UserError
from cpt_merge.core.lock import Lock
from cpt_merge.launcher.run import LOCK_FILE
from cpt_merge.launcher.sync import sync
from cpt_merge.tracking import TrackingConfig, start_tracker


def test_a_run_that_is_at_work_is_left_alone(tmp_path: Path) -> None:
    """Else the transaction log that wandb is writing would be cut, as that of a dead attempt is."""
    log = tmp_path / "training" / "log"
    attempt = log / "wandb" / "offline-run-20261127_000000-id"
    attempt.mkdir(parents=True)
    (attempt / "run-id.wandb").write_bytes(b":W&B")
    (log / "run.json").write_text("{}")
    lock = Lock(tmp_path / LOCK_FILE, tmp_path, "wait")
    lock.take()
    for folder in (tmp_path, log):
        with pytest.raises(UserError, match="in use by process"):
            sync(folder)
    assert (attempt / "run-id.wandb").read_bytes() == b":W&B"
    lock.release()


def test_a_folder_without_logs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no log of a stage"):
        sync(tmp_path)


def test_stages_are_uploaded_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B takes the run that names a version first for its maker."""
    stages = [
        "tokenizer", "embeddings", "data", "training.old-1", "training.old-2", "training", "merge", "evaluation", "sweep",
    ]  # fmt: skip
    for stage in sorted(stages):
        write_json(tmp_path / stage / "log" / "run.json", {})
    write_json(tmp_path / "training" / "log" / "nodes" / "training-node2" / "run.json", {})
    seen: list[Path] = []
    monkeypatch.setattr(cpt_merge.tracking.upload, "upload", seen.append)
    sync(tmp_path)
    node = "training/log/nodes/training-node2"
    logs = [f"{stage}/log" for stage in stages]
    logs.insert(logs.index("training/log") + 1, node)
    assert [log.relative_to(tmp_path).as_posix() for log in seen] == logs


def test_a_run_without_wandb_is_not_called_uploaded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = TrackingConfig(mode="disabled")
    for stage in ("tokenizer", "data"):
        start_tracker(
            config, stage, f"demo-{stage}", "demo", tmp_path / stage / "log", {}, stage
        ).finish()
    with pytest.raises(
        UserError, match=r"nothing to upload, because it was logged with tracking.mode: disabled"
    ):
        sync(tmp_path)
    write_json(tmp_path / "data" / "log" / "run.json", {
        "stage": "data", "run_name": "demo-data", "group": "demo", "run_id": "data", "settings": {}, "mode": "online",
    })  # fmt: skip
    sync(tmp_path)
    said = capfd.readouterr().err
    assert "nothing to upload of tokenizer: logged with tracking.mode: disabled" in said
    assert "W&B: everything else is uploaded" in said
