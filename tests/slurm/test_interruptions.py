"""A training on two nodes of two tasks goes through every kind of interruption and ends with the weights of one that
was left alone. What each costs is written to `interruptions.json` in pytest's folder, for the table of docs/slurm.md.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Job, submit

pytestmark = pytest.mark.slurm

SCRIPT = "slurm/cpt_merge.sh"


def start(cluster: Cluster, recipe: Path, runs: Path, *options: str, nodes: str = "2") -> Job:
    log = runs.parent / "job.log"
    return submit(cluster, log, f"--nodes={nodes}", "--ntasks-per-node=2", "--signal=USR1@30", *options, SCRIPT, recipe,
                  f"runs={runs}", CPT_MERGE_PREFLIGHT="no")  # fmt: skip


def rows(runs: Path) -> list[dict[str, float]]:
    """The training's log: a row per step, each with its time."""
    path = runs / "demo" / "training" / "log" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [row for row in map(json.loads, lines[:-1]) if "train/loss" in row]  # the last may be half written


def wait_for_step(job: Job, runs: Path, step: int) -> None:
    job.wait(lambda: any(row["train/step"] >= step for row in rows(runs)), 150, f"step {step}")


def weights(runs: Path) -> bytes:
    return (runs / "demo" / "training" / "cpt" / "model.safetensors").read_bytes()


def chat_model(runs: Path) -> bytes:
    return (runs / "demo" / "merge" / "chat" / "model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, recipe_path: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of a training on 2 x 2 that nothing happened to."""
    runs = tmp_path_factory.mktemp("undisturbed") / "runs"
    shutil.copytree(prepared, runs)
    job = start(cluster, recipe_path, runs)
    assert job.wait_for_end(300) == "COMPLETED", job.log
    return runs


def killed_task(cluster: Cluster, job: Job) -> None:
    """kill -9 of one task of training on the second node."""
    found = cluster.on("node2", "pgrep", "-f", "launcher.cli train").stdout.split()
    assert cluster.on("node2", "kill", "-9", found[-1]).returncode == 0


def killed_batch_script(cluster: Cluster, job: Job) -> None:
    found = cluster.on("node1", "pgrep", "-f", "slurm_script").stdout.split()
    assert cluster.on("node1", "kill", "-9", *found).returncode == 0


def requeued_by_hand(cluster: Cluster, job: Job) -> None:
    cluster.slurm("scontrol", "requeue", job.id)


def signalled(cluster: Cluster, job: Job) -> None:
    """scancel --signal=TERM: the processes are told to stop, the job goes on."""
    cluster.slurm("scancel", "--signal=TERM", job.id)


def warned(cluster: Cluster, job: Job) -> None:
    """What `--signal=USR1@...` does before the time limit."""
    cluster.slurm("scancel", "--signal=USR1", job.id)


def crashed_node(cluster: Cluster, job: Job) -> None:
    """The second node is gone at once, and comes back."""
    cluster.crash("node2")
    time.sleep(1)
    cluster.boot("node2")


def crashed_first_node(cluster: Cluster, job: Job) -> None:
    """The node of the batch script and of rank 0."""
    cluster.crash("node1")
    time.sleep(1)
    cluster.boot("node1")


INTERRUPTIONS: list[Callable[[Cluster, Job], None]] = [
    signalled, warned, requeued_by_hand, killed_task, killed_batch_script, crashed_node, crashed_first_node,
]  # fmt: skip


@pytest.mark.parametrize("interrupt", INTERRUPTIONS)
def test_an_interrupted_job_ends_with_the_same_weights(
    interrupt: Callable[[Cluster, Job], None], cluster: Cluster, recipe_path: Path, runs: Path, undisturbed: Path
) -> None:
    job = start(cluster, recipe_path, runs)
    wait_for_step(job, runs, 20)
    reached, before = rows(runs)[-1]["train/step"], time.time()
    interrupt(cluster, job)
    job.wait(lambda: job.restarts == 1, 120, "the requeue")
    requeued = time.time()
    assert job.wait_for_end(300) == "COMPLETED", job.log
    assert weights(runs) == weights(undisturbed)
    assert chat_model(runs) == chat_model(undisturbed)
    assert curve(runs) == curve(undisturbed)
    resumed = resumed_at(job)
    record(interrupt.__name__, {
        "steps lost": max(reached - resumed, 0), "requeued after": requeued - before,
        "stepping after": rows(runs)[resumed]["time"] - before,
    })  # fmt: skip


def curve(runs: Path) -> list[tuple[float, float]]:
    """(step, loss): every step once, in order."""
    return [(row["train/step"], row["train/loss"]) for row in rows(runs)]


def resumed_at(job: Job, attempt: int = 1) -> int:
    """The step that a restart of the job went on from."""
    return int(re.findall(r"training: continues from step-(\d+)", job.log)[attempt - 1])


def record(what: str, costs: dict[str, float]) -> None:
    path = Path(os.environ.get("CPT_MERGE_SLURM_RESULTS", "/tmp/cpt-merge-slurm.json"))
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**found, what: {name: round(value, 1) for name, value in costs.items()}}, indent=1))
