"""SIGKILL and resume: W&B's rows equal what was logged, online, offline and after `wandb sync`."""

import os
import random
import time
from pathlib import Path

import pytest
import wandb

from cpt_merge.core.errors import UserError
from cpt_merge.tracking import TrackingConfig, read_log, start_tracker
from cpt_merge.tracking.sinks.wandb_history import read_rows, repair
from cpt_merge.tracking.upload import upload
from cpt_merge.tracking.wandb_compat import record_ends
from tests.tracking.conftest import KEY
from tests.tracking.wandb_log import attempts, history, items

STEPS, EVERY = 120, 20

# A stage in miniature: rows, another kind of row at every checkpoint, and a file to resume from.
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


def attempt(processes, out: Path, mode: str, seconds: float | None = None) -> int:
    """Run the stage, killed `seconds` after its first row. Returns the last printed step."""
    process = processes.python("-c", STAGE, out, mode)
    if seconds is None:
        assert process.finish() == 0, process.stderr
    else:
        process.wait_for("ready")
        time.sleep(seconds)
        process.kill()
    return int(process.stdout.rpartition("\n")[0].split()[-1].replace("ready", "0"))


def log_offline(out: Path, steps: int = STEPS) -> Path:
    """Log in this process what the stage logs. Returns the transaction log."""
    config = TrackingConfig(mode="offline")
    tracker = start_tracker(config, "training", "demo", "g", out, {}, "killed")
    tracker.log({"valid/loss": 0.0}, step=0)
    for step in range(1, steps + 1):
        tracker.log({"train/loss": float(step)}, step=step)
        if step % EVERY == 0:
            tracker.log({"valid/loss": float(step)}, step=step)
    tracker.finish()
    (log,) = attempts(out)
    return log


def kills(count: int, seed: int) -> list[float]:
    generator = random.Random(seed)
    return [generator.uniform(0.2, 1.2) for _ in range(count)]


CASES = [
    pytest.param(kills(1, 1), id="once"),
    pytest.param(kills(5, 2), id="often", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("after", CASES)
def test_offline_and_synced_rows_equal_what_was_logged(
    after: list[float], tmp_path: Path, server, processes
) -> None:
    for seconds in (*after, None):
        attempt(processes, tmp_path, "offline", seconds)
    for metric, rows in EXPECTED.items():
        assert read_log(tmp_path).series(metric) == rows
        assert history(tmp_path, metric) == rows
    sync(processes, *(log.parent for log in attempts(tmp_path)))
    run = server.runs["killed"]
    assert (run.group, run.job_type, run.overwritten) == ("g", "training", 0)
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))
    for metric, rows in EXPECTED.items():
        assert run.rows(metric) == rows


@pytest.mark.parametrize("after", CASES)
@pytest.mark.slow
def test_online_rows_equal_what_was_logged(
    after: list[float], tmp_path: Path, server, processes
) -> None:
    for seconds in (*after, None):
        attempt(processes, tmp_path, "online", seconds)
    run = server.runs["killed"]
    assert run.overwritten == 0
    assert [row["_step"] for row in run.history] == list(range(len(run.history)))
    for metric, rows in EXPECTED.items():
        assert read_log(tmp_path).series(metric) == rows
        assert run.rows(metric) == rows
    assert run.exit_code == 0
    assert list(server.runs) == ["killed"]


def test_sigkill_costs_wandbs_log_at_most_two_seconds_and_the_local_log_nothing(
    tmp_path: Path, processes
) -> None:
    """One second of the flush, one of a busy machine. The resumed stage sends the rows again."""
    done = attempt(processes, tmp_path, "offline", 2.2)
    logged = [step for step, _ in read_log(tmp_path).series("train/loss")]
    assert logged[:done] == list(range(1, done + 1))
    kept = [item["train/step"] for item in items(attempts(tmp_path)[0]) if "train/loss" in item]
    assert kept == list(range(1, len(kept) + 1))
    assert done - len(kept) <= 2.0 / 0.02


def sync(processes, *runs: Path) -> str:
    """The output of `wandb sync`, which leaves a folder where it is called."""
    done = processes.run_python("-m", "wandb", "sync", *runs, cwd=runs[0].parent)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_log_that_a_kill_cut_anywhere_is_repaired_so_that_sync_continues(
    tmp_path: Path, server, processes
) -> None:
    """wandb writes by blocks, so that a kill may leave a part of a record, or no record."""
    log = log_offline(tmp_path, steps=500)
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
    synced = log.with_name(log.name + ".synced")
    synced.unlink(missing_ok=True)
    assert "incomplete record" in sync(processes, log.parent), "the reason for the repair"
    repair(log.parent)
    assert "incomplete record" not in sync(processes, log.parent)
    assert synced.is_file()


SERVICE = f"""
import os, subprocess, sys, threading, time
from pathlib import Path
from cpt_merge.tracking import TrackingConfig, start_tracker

def kill_the_service():
    for moment in sys.argv[3].split(","):
        time.sleep(float(moment))
        subprocess.run(["pkill", "-9", "-P", str(os.getpid()), "wandb-core"])

config, out = TrackingConfig(mode=sys.argv[2]), Path(sys.argv[1])
tracker = start_tracker(config, "training", "demo", "g", out, {{}}, "killed")
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


@pytest.mark.parametrize("mode", ["offline", pytest.param("online", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "moments", ["1.5", pytest.param("1,1.5", marks=pytest.mark.slow)], ids=["once", "twice"]
)
def test_a_service_that_is_killed_costs_no_row_and_doubles_none(
    moments: str, mode: str, tmp_path: Path, server, processes
) -> None:
    done = processes.run_python("-c", SERVICE, tmp_path, mode, moments)
    assert done.returncode == 0, done.stderr
    if mode == "offline":
        sync(processes, *(log.parent for log in attempts(tmp_path)))
    run = server.runs["killed"]
    for metric, expected in EXPECTED.items():
        assert run.rows(metric) == expected
    assert len([row for row in run.history if "train/continuations" in row]) == 1


def test_rows_that_the_offline_log_lacks_follow_from_the_local_log(tmp_path: Path, server) -> None:
    """As after a full disk, or a service that could not be started again."""
    log = log_offline(tmp_path)
    ends = record_ends(log.read_bytes())
    os.truncate(log, ends[len(ends) // 2])
    upload(tmp_path)
    for metric, rows in EXPECTED.items():
        assert server.runs["killed"].rows(metric) == rows


def test_a_server_that_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch) -> None:
    log_offline(tmp_path, steps=1)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for address in ("http://127.0.0.1:1", "http://bob:hunter2@127.0.0.1:1"):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        wandb.teardown()
        with pytest.raises(
            UserError, match=r"cannot be reached \(http://127.0.0.1:1 does not answer\)"
        ):
            upload(tmp_path)
