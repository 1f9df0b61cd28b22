"""Training on two nodes of two tasks survives every kind of interruption.

It ends with the weights of an undisturbed training. The cost of each interruption is written to
/tmp/cpt-merge-slurm.json, for the table of docs/slurm.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster, SlurmJob
from tests.slurm.jobs import (
    chat_model,
    curve,
    record,
    resumed_at,
    rows,
    start,
    wait_for_step,
    weights,
)

pytestmark = pytest.mark.slurm


def killed_task(cluster: SlurmCluster, job: SlurmJob) -> None:
    """kill -9 of one task of training on the second node."""
    found = cluster.on("node2", "pgrep", "-f", "cpt_merge train").stdout.split()
    assert cluster.on("node2", "kill", "-9", found[-1]).returncode == 0


def killed_batch_script(cluster: SlurmCluster, job: SlurmJob) -> None:
    found = cluster.on("node1", "pgrep", "-f", "slurm_script").stdout.split()
    assert cluster.on("node1", "kill", "-9", *found).returncode == 0


def requeued_by_hand(cluster: SlurmCluster, job: SlurmJob) -> None:
    cluster.slurm("scontrol", "requeue", job.id)


def signalled(cluster: SlurmCluster, job: SlurmJob) -> None:
    """scancel --signal=TERM: the processes are asked to stop, the job is not cancelled."""
    cluster.slurm("scancel", "--signal=TERM", job.id)


def warned(cluster: SlurmCluster, job: SlurmJob) -> None:
    """As `--signal=USR1@...` before the time limit."""
    cluster.slurm("scancel", "--signal=USR1", job.id)


def preempted(cluster: SlurmCluster, job: SlurmJob) -> None:
    """A job of a higher partition takes the nodes: SIGTERM, the partition's GraceTime, requeue."""
    options = "--partition=urgent --nodes=3 --exclusive --output=/dev/null".split()
    cluster.slurm("sbatch", *options, "--wrap=sleep 5")


def crashed_node(cluster: SlurmCluster, job: SlurmJob) -> None:
    """The second node is lost without warning, and comes back."""
    cluster.crash("node2")
    time.sleep(1)
    cluster.boot("node2")


def crashed_first_node(cluster: SlurmCluster, job: SlurmJob) -> None:
    """The node of the batch script and of rank 0."""
    cluster.crash("node1")
    time.sleep(1)
    cluster.boot("node1")


INTERRUPTIONS: list[Callable[[SlurmCluster, SlurmJob], None]] = [
    signalled, warned, requeued_by_hand, preempted, killed_task, killed_batch_script, crashed_node,
    crashed_first_node,
]  # fmt: skip


@pytest.mark.parametrize("interrupt", INTERRUPTIONS)
def test_an_interrupted_job_ends_with_the_same_weights(
    interrupt: Callable[[SlurmCluster, SlurmJob], None],
    cluster: SlurmCluster,
    recipe_path: Path,
    runs: Path,
    undisturbed: Path,
) -> None:
    job = start(cluster, recipe_path, runs, "--partition=scavenger")
    wait_for_step(job, runs, 20)
    reached, before = rows(runs)[-1]["train/step"], time.time()
    interrupt(cluster, job)
    job.wait(lambda: job.restarts == 1, "requeue")
    requeued = time.time()
    assert job.wait_for_end() == "COMPLETED", job.log
    assert weights(runs) == weights(undisturbed)
    assert chat_model(runs) == chat_model(undisturbed)
    assert curve(runs) == curve(undisturbed)
    resumed = resumed_at(job)
    record(interrupt.__name__, {
        "steps lost": max(reached - resumed, 0), "requeued after": requeued - before,
        "stepping after": rows(runs)[resumed]["time"] - before,
    })  # fmt: skip
