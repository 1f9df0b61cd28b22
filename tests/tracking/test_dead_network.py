"""The server disappears while a run logs: nothing waits for it, and `sync` uploads the rest."""

import subprocess
import time
from pathlib import Path

import pytest

from cpt_merge.launcher.sync import sync
from cpt_merge.tracking import TrackingConfig, read_log, start_tracker
from cpt_merge.tracking.sinks import wandb as wandb_sink
from tests.tracking.wandb_log import attempts

STEPS = 60


def start(directory: Path):
    return start_tracker(TrackingConfig(), "training", "demo", "g", directory, {}, "cut")


@pytest.mark.parametrize(
    ("way", "media"),
    [
        pytest.param("hangs", True, id="tables-hangs"),
        *(
            pytest.param(way, media, id=f"{kind}-{way}", marks=pytest.mark.slow)
            for way, media, kind in (
                ("stopped", True, "tables"), ("stopped", False, "rows"), ("hangs", False, "rows")
            )
        ),
    ],
)  # fmt: skip
def test_a_server_that_goes_away_slows_nothing_and_sync_uploads_the_rest(
    way: str, media: bool, tmp_path: Path, server, capfd, monkeypatch
) -> None:
    monkeypatch.setattr(wandb_sink, "FINISH_TIMEOUT", 1.0)
    monkeypatch.setattr(wandb_sink, "FINISH_MARGIN", 0.5)
    tracker = start(tmp_path)
    slowest = 0.0
    for step in range(1, STEPS + 1):
        began = time.monotonic()
        tracker.log({"train/loss": float(step)}, step=step)
        if media and step % 20 == 0:
            tracker.table("train/continuations", ["step"], [[step]])
        slowest = max(slowest, time.monotonic() - began)
        if step == STEPS // 3:
            server.wait_until(lambda: "cut" in server.runs and server.runs["cut"].history)
            if way == "stopped":
                server.stop()
            server.hangs = True
    began = time.monotonic()
    tracker.finish()
    assert time.monotonic() - began < 4
    assert slowest < 0.5, "of a busy machine; a wait for the server would be seconds"
    assert read_log(tmp_path).series("train/loss") == [
        (step, float(step)) for step in range(1, STEPS + 1)
    ]
    assert (
        f"not everything was uploaded; upload it later with: cpt-merge sync {tmp_path}"
        in capfd.readouterr().err
    )

    server.hangs = False
    if way == "stopped":
        server.start()
    assert len(server.runs["cut"].rows("train/loss")) < STEPS
    sync(tmp_path)
    run = server.runs["cut"]
    assert run.rows("train/loss") == [(step, float(step)) for step in range(1, STEPS + 1)]
    assert run.overwritten == 0
    assert any("continuations" in name for name in run.files) == media
    sync(tmp_path)
    assert "W&B: everything is uploaded" in capfd.readouterr().err
    assert len(run.rows("train/loss")) == STEPS


def test_a_stage_cut_off_and_continued_offline_is_synced_in_order(
    tmp_path: Path, server, monkeypatch
) -> None:
    monkeypatch.setattr(wandb_sink, "FINISH_TIMEOUT", 1.0)
    monkeypatch.setattr(wandb_sink, "FINISH_MARGIN", 0.5)
    first = start(tmp_path)
    for step in range(1, 21):
        first.log({"train/loss": float(step)}, step=step)
    server.stop()
    first.finish(failed=True)
    second = start(tmp_path)
    assert second.record()["mode"] == "offline"
    second.resume_from(15)
    for step in range(16, 31):
        second.log({"train/loss": float(step)}, step=step)
    second.finish()
    server.start()
    sync(tmp_path)
    assert server.runs["cut"].rows("train/loss") == [(step, float(step)) for step in range(1, 31)]


def test_a_process_ends_without_waiting_for_a_server_that_is_gone(
    tmp_path: Path, server, processes
) -> None:
    """wandb's own end would wait for as long as its uploads are retried."""
    code = f"""
from pathlib import Path
from cpt_merge.tracking import TrackingConfig, start_tracker
from cpt_merge.tracking.sinks import wandb as wandb_sink
wandb_sink.FINISH_TIMEOUT = wandb_sink.FINISH_MARGIN = 0.5
out = Path({str(tmp_path)!r})
tracker = start_tracker(TrackingConfig(), "training", "demo", "g", out, {{}}, "cut")
print("open", flush=True)
input()
tracker.log({{"train/loss": 1.0}}, step=1)
tracker.finish()
print("finished", flush=True)
"""
    process = processes.python("-c", code, stdin=subprocess.PIPE)
    process.wait_for("open")
    server.hangs = True
    process.write("\n")
    process.wait_for("finished")
    assert process.finish(limit=10) == 0
    errors = process.stderr
    assert "Traceback" not in errors, errors
    assert len(attempts(tmp_path)) == 1
