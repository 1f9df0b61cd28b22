"""`cpt-merge sync`: which logs it is let to. What it uploads is tested in tests/tracking."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import UserError
from core.lock import Lock
from launcher.pipeline import LOCK_FILE
from launcher.sync import sync


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
    with pytest.raises(UserError, match="holds no log of a stage"):
        sync(tmp_path)
