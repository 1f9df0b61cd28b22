"""What Slurm's tools print, as version 22.05 words it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt_merge.cluster import slurm
from cpt_merge.cluster.slurm import KilledTask


@pytest.fixture
def messages(tmp_path: Path) -> Path:
    """A file of srun's messages; not written yet."""
    return tmp_path / "srun.log"


def test_only_tasks_that_were_killed_from_outside_are_named(messages: Path) -> None:
    assert slurm.killed_tasks(messages) == []
    messages.write_text(
        "srun: error: node1: task 0: Exited with exit code 1\n"
        "srun: launch/slurm: _step_signal: Terminating StepId=2.4\n"
        "srun: error: node2: tasks 3-4: Killed\n"
        "srun: error: node1: task 1: Terminated\n"
        "srun: error: Node failure on node7\n"
    )
    assert slurm.killed_tasks(messages) == [
        KilledTask(3, "node2", "it was ended from outside (Killed)"),
        KilledTask(0, "node7", "its node is gone"),
    ]


def test_a_signal_is_a_request_unless_srun_sent_it_after_a_failure(messages: Path) -> None:
    assert slurm.requested_signal(143, messages) == "SIGTERM"
    messages.write_text("srun: error: node1: task 0: User defined signal 1\n")
    assert slurm.requested_signal(138, messages) == "SIGUSR1"
    assert slurm.requested_signal(1, messages) == ""
    messages.write_text("srun: error: node1: task 0: Exited with exit code 1\n")
    assert slurm.requested_signal(143, messages) == ""


@pytest.mark.parametrize(
    ("line", "description"),
    [
        ("RUNNING|1:30:00|None|node[1-2]", "running on node[1-2], 1:30:00 left of its time"),
        ("PENDING|2:00:00|Priority|", "pending (Priority)"),
        ("", "no longer in the queue (a new job would continue from here)"),
    ],
)
def test_a_job_is_described(
    line: str, description: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "squeue is not available" in slurm.describe_job("7")
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\necho '{line}'\n")
    squeue.chmod(0o755)
    assert slurm.describe_job("7") == description
