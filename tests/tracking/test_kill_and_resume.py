"""SIGKILL and resume: W&B's rows equal what was logged, online, offline and after `wandb sync`."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb

from cpt_merge.core.errors import UserError
from cpt_merge.tracking import read_log
from cpt_merge.tracking.sinks.wandb_history import read_rows, repair
from cpt_merge.tracking.upload import upload
from cpt_merge.tracking.wandb_compat import record_ends
from tests.tracking.conftest import KEY
from tests.tracking.wandb_log import attempts, history, items

STEPS, EVERY = 120, 20

# A stage in miniature: rows, another kind of row at every checkpoint, and a file that says where to go on.
STAGE = f"""
import sys, time
from pathlib import Path
from cpt_merge.tracking import TrackingConfig, start_tracker
out, mode = Path(sys.argv[1]), sys.argv[2]
tracker = start_tracker(TrackingConfig(mode=mode), "training", "demo", "g", out, {{}}, "killed")
saved = out / "checkpoint"
start = int(saved.read_text()) if saved.is_file() else 0
tracker.resume_from(start)
if start == 0:
    tracker.log({{"valid/loss": 0.0}}, step=0)
print("ready", flush=True)
for step in range(start + 1, {STEPS} + 1):
    tracker.log({{"train/loss": float(step), "train/tokens": 8.0 * step}}, step=step)
    if step % {EVERY} == 0:
        tracker.log({{"valid/loss": float(step)}}, step=step)
        saved.with_suffix(".tmp").write_text(str(step))
        saved.with_suffix(".tmp").rename(saved)
    print(step, flush=True)
    time.sleep(0.02)
tracker.finish()
"""

EXPECTED = {
    "train/loss": [(step, float(step)) for step in range(1, STEPS + 1)],
    "valid/loss": [(step, float(step)) for step in range(0, STEPS + 1, EVERY)],
}


def attempt(out: Path, mode: str, seconds: float | None) -> int:
    """Run the stage, killed `seconds` after it began to log. Returns the last step that it said."""
    process = subprocess.Popen(
        [sys.executable, "-c", STAGE, str(out), mode], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    process.stdout.readline()
    if seconds is not None:
        time.sleep(seconds)
        process.kill()
    steps = [int(line) for line in process.stdout if line.endswith("\n")]
    assert process.wait() in ((0,) if seconds is None else (-9, 0))
    return steps[-1] if steps else 0


def kills(count: int, seed: int) -> list[float]:
    generator = random.Random(seed)
    return [generator.uniform(0.2, 1.2) for _ in range(count)]


CASES = [
    pytest.param(kills(1, 1), id="once"),
    pytest.param(kills(5, 2), id="often", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("after", CASES)
def test_offline_and_synced_rows_equal_what_was_logged(
    after: list[float], tmp_path: Path, server
) -> None:
    for seconds in after:
        attempt(tmp_path, "offline", seconds)
    attempt(tmp_path, "offline", None)
    for metric, rows in EXPECTED.items():
        assert read_log(tmp_path).series(metric) == rows
        assert history(tmp_path, metric) == rows
    sync(*(log.parent for log in attempts(tmp_path)))
    run = server.runs["killed"]
    assert (run.group, run.job_type, run.overwritten) == ("g", "training", 0)
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))
    for metric, rows in EXPECTED.items():
        assert run.rows(metric) == rows


@pytest.mark.parametrize("after", CASES)
def test_online_rows_equal_what_was_logged(after: list[float], tmp_path: Path, server) -> None:
    for seconds in after:
        attempt(tmp_path, "online", seconds)
    attempt(tmp_path, "online", None)
    run = server.runs["killed"]
    assert run.overwritten == 0
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))
    for metric, rows in EXPECTED.items():
        assert read_log(tmp_path).series(metric) == rows
        assert run.rows(metric) == rows
    assert run.exit_code == 0
    assert list(server.runs) == ["killed"]


def test_sigkill_costs_wandbs_log_at_most_two_seconds_and_the_local_log_nothing(
    tmp_path: Path,
) -> None:
    """Two: one of the flush, one of a busy machine. The resumed stage sends them again."""
    done = attempt(tmp_path, "offline", 2.2)
    assert [step for step, _ in read_log(tmp_path).series("train/loss")][:done] == list(
        range(1, done + 1)
    )
    kept = [item["train/step"] for item in items(attempts(tmp_path)[0]) if "train/loss" in item]
    assert kept == list(range(1, len(kept) + 1))
    assert done - len(kept) <= 2.0 / 0.02


def sync(*runs: Path) -> str:
    command = [sys.executable, "-m", "wandb", "sync", *map(str, runs)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=runs[0].parent
    )  # it leaves a folder
    return done.stdout + done.stderr


def test_a_log_that_a_kill_cut_anywhere_is_repaired_so_that_sync_goes_on(
    tmp_path: Path, server
) -> None:
    """wandb writes by blocks: a kill may leave a part of a record, or no record.

    `wandb sync` would stop there.
    """
    attempt(tmp_path, "offline", None)
    (log,) = attempts(tmp_path)
    data, whole = log.read_bytes(), list(read_rows(log))
    assert [step for step, _ in whole] == [item["_step"] for item in items(log)]
    assert len(data) > 32768, "more than a block"
    assert whole[0] == (0, (0.0, frozenset({"valid/loss"})))
    for size in (0, 7, 60, 32760, 32768, 32775, len(data) - 3, len(data)):
        log.parent.mkdir(exist_ok=True)
        log.write_bytes(data[:size])
        rows = list(read_rows(log))
        repair(log.parent)
        assert log.is_file() == (size > 60), "an attempt that logged nothing is removed"
        assert list(read_rows(log)) == rows == whole[: len(rows)]
    log.write_bytes(data[:32775])
    log.parent.joinpath(log.name + ".synced").unlink(missing_ok=True)
    assert "incomplete record" in sync(log.parent), "what it is repaired for"
    repair(log.parent)
    assert "incomplete record" not in sync(log.parent)
    assert log.parent.joinpath(log.name + ".synced").is_file()


SERVICE = f"""
import os, subprocess, sys, threading, time
from pathlib import Path
from cpt_merge.tracking import TrackingConfig, start_tracker

def kill_the_service():
    for moment in sys.argv[3].split(","):
        time.sleep(float(moment))
        subprocess.run(["pkill", "-9", "-P", str(os.getpid()), "wandb-core"])

tracker = start_tracker(TrackingConfig(mode=sys.argv[2]), "training", "demo", "g", Path(sys.argv[1]), {{}}, "killed")
tracker.resume_from(0)
tracker.log({{"valid/loss": 0.0}}, step=0)
threading.Thread(target=kill_the_service, daemon=True).start()
for step in range(1, {STEPS} + 1):
    tracker.log({{"train/loss": float(step)}}, step=step)
    if step % {EVERY} == 0:
        tracker.log({{"valid/loss": float(step)}}, step=step)
    if step == 10:
        tracker.table("train/continuations", ["step"], [[step]])
    time.sleep(0.05)
tracker.finish()
"""


@pytest.mark.parametrize("mode", ["offline", "online"])
@pytest.mark.parametrize(
    "moments", ["1.5", pytest.param("1,1.5", marks=pytest.mark.slow)], ids=["once", "twice"]
)
def test_a_service_that_is_killed_costs_no_row_and_doubles_none(
    moments: str, mode: str, tmp_path: Path, server
) -> None:
    command = [sys.executable, "-c", SERVICE, str(tmp_path), mode, moments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    if mode == "offline":
        sync(*(log.parent for log in attempts(tmp_path)))
    run = server.runs["killed"]
    for metric, expected in EXPECTED.items():
        assert run.rows(metric) == expected
    assert len([row for row in run.history if "train/continuations" in row]) == 1


def test_rows_that_the_offline_log_lacks_follow_from_the_local_log(tmp_path: Path, server) -> None:
    """As after a full disk, or a service that could not be had again."""
    attempt(tmp_path, "offline", None)
    (log,) = attempts(tmp_path)
    ends = record_ends(log.read_bytes())
    os.truncate(log, ends[len(ends) // 2])
    upload(tmp_path)
    for metric, rows in EXPECTED.items():
        assert server.runs["killed"].rows(metric) == rows


def test_a_server_that_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch) -> None:
    attempt(tmp_path, "offline", None)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for address in ("http://127.0.0.1:1", "http://bob:hunter2@127.0.0.1:1"):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        wandb.teardown()
        with pytest.raises(
            UserError, match=r"cannot be reached \(http://127.0.0.1:1 does not answer\)"
        ):
            upload(tmp_path)
