"""The attempts of a Slurm job: what became of each, and when the job gives up.

The files are those of real attempts.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from cpt_merge.cluster import attempts, slurm
from cpt_merge.cluster.attempts import (
    ATTEMPT,
    BATCH,
    begin,
    end,
    first_failure,
    note_failure,
    note_stop,
)
from cpt_merge.core.errors import Interrupted, UserError
from cpt_merge.launcher.recipe import Recipe
from tests.processes import Processes

GLOO = "RuntimeError: [pair.cc:553] Connection closed by peer [10.0.0.{}]:{}."


@pytest.fixture
def job(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe with an empty folder for its run; this process is the only one of a job."""
    monkeypatch.setattr(attempts, "_requeue_for_batch_script", lambda: None)
    return recipe.model_copy(update={"runs": str(tmp_path)})


def started(restart: int = 0, job: int = 7, **more: str) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_RESTART_COUNT": str(restart),
        "SLURM_JOB_NODELIST": "node[1-2]",
        **more,
    }


def attempt(
    recipe: Recipe, restart: int = 0, *, code: int | None = 1, failure: str = "", killed: str = ""
) -> str:
    """One attempt from begin to end. Returns what follows; nothing without an end (code None)."""
    folder = begin(recipe, started(restart))
    if failure:
        fails(folder, 0, failure)
    if killed:
        (folder / "srun.log").write_text(killed)
    return end(recipe, folder, code) if code is not None else ""


def fails(
    folder: Path, rank: int, text: str, seconds: float = 0.0, needs_user: bool = False
) -> None:
    values = {
        "command": "train",
        "rank": rank,
        "node": f"node{rank + 1}",
        "text": text,
        "time": seconds,
    }
    (folder / f"failed-rank-{rank:04d}.json").write_text(
        json.dumps({**values, "needs_user": needs_user})
    )


def checkpoint(recipe: Recipe, step: int) -> None:
    folder = recipe.directory / "training" / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "train_state.json").write_text("{}")


def test_a_finished_pipeline_is_finished(job: Recipe) -> None:
    assert attempt(job, code=0) == "finished"


def test_a_failure_is_tried_again_until_it_was_the_same_three_times(job: Recipe) -> None:
    assert attempt(job, 0, failure=GLOO.format(1, 20400)) == "requeue"
    assert (
        attempt(job, 1, failure=GLOO.format(2, 31455)) == "requeue"
    )  # other numbers, the same failure
    assert attempt(job, 2, failure=GLOO.format(1, 44454)) == "given up"
    with pytest.raises(
        UserError, match=r"given up: .*Connection closed by peer.*The same 3 times in a row"
    ):
        begin(job, started(3))


def test_progress_and_another_failure_begin_a_new_count(job: Recipe) -> None:
    assert attempt(job, 0, failure="ValueError: a") == "requeue"
    assert attempt(job, 1, failure="ValueError: b") == "requeue"
    assert attempt(job, 2, failure="ValueError: b") == "requeue"
    folder = begin(job, started(3))
    checkpoint(job, 8)
    fails(folder, 0, "ValueError: b")
    assert end(job, folder, 1) == "requeue"
    assert attempt(job, 4, failure="ValueError: b") == "requeue"
    assert attempt(job, 5, failure="ValueError: b") == "requeue"
    assert attempt(job, 6, failure="ValueError: b") == "given up"


def test_what_the_user_has_to_fix_is_not_tried_again(job: Recipe) -> None:
    folder = begin(job, started())
    fails(folder, 3, "RuntimeError: the others miss rank 1", 1.0)
    fails(
        folder,
        1,
        "training.global_batch_size = 8 does not divide over 3 processes; set 9.",
        2.0,
        needs_user=True,
    )
    assert end(job, folder, 143) == "given up"
    assert "set 9." in json.loads((folder / "ended.json").read_text())["reason"]


@pytest.mark.parametrize(
    "environment",
    [started(1), started(job=8, SLURM_JOB_DEPENDENCY="afternotok:7"),
     started(job=8, SLURM_ARRAY_TASK_ID="2", SLURM_ARRAY_TASK_MIN="1")],
    ids=["requeued", "chain", "array"],
)  # fmt: skip
def test_an_attempt_that_starts_by_itself_ends_where_the_last_one_was_given_up(
    job: Recipe, environment: dict[str, str]
) -> None:
    folder = begin(job, started())
    fails(folder, 0, "set something", needs_user=True)
    end(job, folder, 2)
    with pytest.raises(UserError, match="given up"):
        begin(job, environment)


def test_a_person_may_begin_again(job: Recipe) -> None:
    folder = begin(job, started())
    fails(folder, 0, "set something", needs_user=True)
    end(job, folder, 2)
    assert begin(job, started(job=8)).is_dir()
    assert begin(job, started(job=9, SLURM_ARRAY_TASK_ID="1", SLURM_ARRAY_TASK_MIN="1")).is_dir()


@pytest.mark.parametrize(("reason", "follows"), [("SIGTERM", "requeue"), ("SIGUSR1", "given up")])
def test_preemption_never_counts_but_a_time_limit_too_short_to_save_does(
    job: Recipe, monkeypatch: pytest.MonkeyPatch, reason: str, follows: str
) -> None:
    outcomes = []
    for restart in range(3):
        folder = begin(job, started(restart))
        monkeypatch.setenv(ATTEMPT, str(folder))
        note_stop(Interrupted(f"stopped by {reason}", reason))
        outcomes.append(end(job, folder, 75))
    assert outcomes == ["requeue", "requeue", follows]


def test_an_attempt_that_nobody_ended_counts_as_well(job: Recipe) -> None:
    for restart in range(3):
        attempt(job, restart, code=None)
    with pytest.raises(UserError, match="died without a report"):
        begin(job, started(3))


def test_a_killed_rank_comes_before_those_that_miss_it(job: Recipe) -> None:
    folder = begin(job, started())
    fails(folder, 0, GLOO.format(2, 1), 1.0)
    (folder / "srun.log").write_text("srun: error: node2: task 3: Killed\n")
    failure = first_failure(folder)
    assert failure
    assert (failure.rank, failure.node) == (3, "node2")
    assert "Killed" in failure.text


def test_the_last_lines_of_the_first_failing_rank_are_repeated(
    job: Recipe, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = begin(job, started())
    (folder / "train-rank-0000-node1.log").write_text("rank 0 saw nothing\n")
    (folder / "train-rank-0001-node2.log").write_text("something\nRuntimeError: CUDA error\n")
    fails(folder, 0, GLOO.format(2, 1), 2.0)
    fails(folder, 1, "RuntimeError: CUDA error", 1.0)
    end(job, folder, 1)
    printed = capfd.readouterr().err
    assert "1: RuntimeError: CUDA error" in printed
    assert "rank 0 saw nothing" not in printed
    assert "first on rank 1 on node2" in printed


def test_a_process_reports_its_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ATTEMPT, str(tmp_path))
    note_failure("train", ZeroDivisionError("by zero"))
    failure = first_failure(tmp_path)
    assert failure
    assert (failure.command, failure.text) == ("train", "ZeroDivisionError: by zero")


@pytest.mark.parametrize(("rank", "code"), [(0, 75), (1, 0)])
def test_a_signal_ends_any_command_cleanly_and_rank_0_reports_for_all(
    rank: int, code: int, tmp_path: Path, processes: Processes
) -> None:
    """Whatever the command does: here it waits for text from a pipe that nobody writes to."""
    pipe, folder = tmp_path / "pipe.yaml", tmp_path / "attempt"
    os.mkfifo(pipe)
    folder.mkdir()
    task = {
        "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0",
        ATTEMPT: str(folder), BATCH: f"here:{os.getpid()}", "SLURMD_NODENAME": "here",
    }  # fmt: skip
    process = processes.python("-m", "cpt_merge", "train", pipe, env=task)
    with pipe.open("w"):  # returns when the command has opened the other end
        process.signal(signal.SIGUSR1)
        assert process.finish() == code
    stopped = folder / "stopped.json"
    assert stopped.is_file() == (rank == 0)
    assert rank or json.loads(stopped.read_text())["reason"] == "SIGUSR1"


@pytest.mark.parametrize(("code", "follows"), [(143, "requeue"), (138, "given up")])
def test_a_signal_before_a_command_can_handle_it_is_a_request_too(
    job: Recipe, capfd: pytest.CaptureFixture[str], code: int, follows: str
) -> None:
    how = {143: "Terminated", 138: "User defined signal 1"}[code]
    outcomes = [
        attempt(job, restart, code=code, killed=f"srun: error: node1: task 0: {how}\n")
        for restart in range(3)
    ]
    assert outcomes == ["requeue", "requeue", follows]
    assert "while a step was starting" in capfd.readouterr().err


def test_processes_that_srun_ends_after_a_failure_were_not_asked_to_stop(job: Recipe) -> None:
    ended = (
        "srun: error: node1: task 0: Exited with exit code 1\n"
        "srun: error: node1: task 1: Terminated\n"
    )
    outcomes = [attempt(job, restart, code=143, killed=ended) for restart in range(3)]
    assert outcomes[-1] == "given up"


def test_a_run_that_another_job_works_on_is_left_alone(
    job: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {"7": "RUNNING"}
    monkeypatch.setattr(slurm, "job_state", states.get)
    folder = begin(job, started())
    with pytest.raises(
        UserError, match=r"is in use by job 7 on node\[1-2\] \(running\); wait for it"
    ):
        begin(job, started(job=8))
    assert not (folder / "ended.json").exists()
    assert [one.folder for one in attempts.attempts(job.directory)] == [folder]
    assert begin(job, started(restart=1)).is_dir()  # the same job, back from the queue
    states["7"] = "COMPLETING"
    monkeypatch.setattr(time, "sleep", lambda seconds: states.clear())
    assert begin(job, started(job=8)).is_dir()


def test_damaged_records_are_ignored_with_a_message(
    job: Recipe, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = begin(job, started())
    (folder / "failed-rank-0000.json").write_text("[]")
    (folder / "stopped.json").write_text('{"reason"')
    assert end(job, folder, 1) == "requeue"
    for text in ("[]", "null", "{", '{"job": 5}'):
        (folder / "begun.json").write_text(text)
        assert attempts.attempts(job.directory) == []
    said = capfd.readouterr().err
    assert said.count("begun.json is damaged") == 4
    assert "failed-rank-0000.json is damaged" in said
    assert "stopped.json is damaged" in said
    assert begin(job, started(1)).is_dir()


def test_a_run_folder_that_cannot_be_written(job: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\); set `runs`"):
        begin(job.model_copy(update={"runs": str(tmp_path / "file")}), started())
