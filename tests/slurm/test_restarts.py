"""Time limits, other numbers of nodes, lost nodes, crash loops, chains and arrays."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import LIMIT, ROOT, SlurmCluster, SlurmJob, submit
from tests.slurm.conftest import SETTINGS
from tests.slurm.jobs import (
    SCRIPT,
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

# Several jobs of two minutes on any machine
LONG = [f"training.tokens={7 * SETTINGS['training']['tokens']}", "corpus.allow_repeats=true"]


def test_a_time_limit_that_is_hit_twice_costs_nothing(
    cluster: SlurmCluster, recipe_path: Path, runs: Path, prepared: Path, tmp_path: Path
) -> None:
    undisturbed = tmp_path / "undisturbed" / "runs"
    shutil.copytree(prepared, undisturbed)
    alone = start(cluster, recipe_path, undisturbed, more=LONG)
    assert alone.wait_for_end() == "COMPLETED", alone.log
    job = start(
        cluster, recipe_path, runs, "--time=2", more=LONG
    )  # Slurm's smallest unit is a minute
    assert job.wait_for_end() == "COMPLETED", job.log
    assert job.restarts >= 2
    assert weights(runs) == weights(undisturbed)
    assert chat_model(runs) == chat_model(undisturbed)
    assert curve(runs) == curve(undisturbed)
    record("time limit", {"restarts": job.restarts, "steps lost": 0})


def test_restarts_on_fewer_and_on_more_nodes_keep_the_order_of_samples(
    cluster: SlurmCluster, recipe_path: Path, runs: Path, undisturbed: Path
) -> None:
    # Two (pretend) GPUs give two tasks. With --ntasks-per-node Slurm would keep the number of tasks
    # and wait for the node.
    job = start(cluster, recipe_path, runs, nodes="2-3", two="gpus-per-node")
    job.wait_for_log("6 shards, 6 processes")
    wait_for_step(job, runs, 12)
    cluster.crash("node3")
    job.wait_for_log("4 shards, 4 processes")
    cluster.boot("node3")  # before a fast machine has finished
    job.wait_for_log("training: continues from")
    wait_for_step(job, runs, resumed_at(job, 1) + 4)
    cluster.slurm("scontrol", "requeue", job.id)
    job.wait_for_log("6 shards, 6 processes", times=2)
    assert job.wait_for_end() == "COMPLETED", job.log
    steps, losses = zip(*curve(runs), strict=True)
    assert steps == tuple(range(1, len(steps) + 1))
    # The same samples in the same order. Sums are added in another order, so last digits differ.
    assert losses == pytest.approx([loss for _, loss in curve(undisturbed)], rel=2e-4)


def test_a_node_that_is_lost_while_a_checkpoint_is_written(
    cluster: SlurmCluster, recipe_path: Path, runs: Path, undisturbed: Path
) -> None:
    every_step = ["training.checkpoints.every=1"]  # so that one is nearly always being written
    job = start(cluster, recipe_path, runs, more=every_step)
    checkpoints = runs / "demo" / "training" / "checkpoints"
    for attempt in itertools.count(1):
        wait_for_step(job, runs, 10)
        _wait_for_unfinished(job, checkpoints)
        cluster.crash("node2")
        hit = list(checkpoints.glob("step-*.tmp"))
        time.sleep(1)
        cluster.boot("node2")
        job.wait_for_log(f"attempt {attempt + 1} at this run")
        if hit:
            break
        assert attempt < 3, "no checkpoint was being written when the node was lost"
    assert job.wait_for_end() == "COMPLETED", job.log
    assert weights(runs) == weights(undisturbed)
    assert curve(runs) == curve(undisturbed)


def _wait_for_unfinished(job: SlurmJob, checkpoints: Path) -> None:
    end = time.monotonic() + LIMIT
    while not list(checkpoints.glob("step-*.tmp")):  # not `wait`: it exists for a moment only
        assert time.monotonic() < end, job.log
        time.sleep(0.002)


def test_the_same_failure_three_times_ends_the_requeueing_and_says_why(
    cluster: SlurmCluster, recipe_path: Path, runs: Path, tmp_path: Path
) -> None:
    """A rank that is killed each time, as one that runs out of memory is."""
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        'if [[ "$*" == *"cpt_merge train"* && $SLURM_PROCID == 3 ]]; then\n'
        '    echo "allocating more and more"\n'
        "    kill -9 $$\n"
        "fi\n"
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    job = start(cluster, recipe_path, runs, CPT_MERGE_PYTHON=str(python))
    assert job.wait_for_end() == "FAILED", job.log
    assert job.restarts == 2
    assert job.fields["ExitCode"] == "2:0"
    assert "first on rank 3 on node2: it was ended from outside (Killed)" in job.log
    assert "The same 3 times in a row, without progress; the job is not tried again." in job.log
    assert "3: allocating more and more" in job.log, "the log of the rank that failed first"


def test_a_chain_for_sites_where_jobs_may_not_requeue_themselves(
    cluster: SlurmCluster, recipe_path: Path, runs: Path, undisturbed: Path
) -> None:
    options = ["--no-requeue", f"--output={runs.parent}/job-%j.log", "--signal=USR1@30"]
    words = [
        sys.executable, "-m", "cpt_merge", "submit", recipe_path, f"runs={runs}",
        "--nodes=2", "--tasks-per-node=2", "--chain=3",
        *(f"--sbatch={option}" for option in options),
    ]  # fmt: skip
    printed = cluster.slurm(*map(str, words), CPT_MERGE_PREFLIGHT="no")
    first, second, third = (
        SlurmJob(cluster, id, runs.parent / f"job-{id}.log") for id in printed.split()
    )
    wait_for_step(first, runs, 12)
    cluster.slurm("scancel", "--signal=TERM", first.id)
    assert first.wait_for_end() == "FAILED"
    assert "may not requeue itself" in first.log
    assert second.wait_for_end() == "COMPLETED", second.log
    assert third.wait_for_end() == "CANCELLED"  # there is nothing left to do
    assert weights(runs) == weights(undisturbed)


def test_an_array_whose_tasks_follow_one_another(
    cluster: SlurmCluster, recipe_path: Path, runs: Path, undisturbed: Path
) -> None:
    log = runs.parent / "job-%a.log"
    options = "--array=1-3%1 --no-requeue --nodes=2 --ntasks-per-node=2".split()
    words = [*options, SCRIPT, recipe_path, f"runs={runs}"]
    job = submit(cluster, log, *words, CPT_MERGE_PREFLIGHT="no")
    tasks = [
        SlurmJob(cluster, f"{job.id}_{number}", runs.parent / f"job-{number}.log")
        for number in (1, 2, 3)
    ]
    wait_for_step(tasks[0], runs, 12)
    # Slurm 22.05 signals an array's task, and then reports that it could not
    cluster.slurm("bash", "-c", f"scancel --quiet --signal=TERM {tasks[0].id} || true")
    assert tasks[1].wait_for_end() == "COMPLETED", tasks[1].log
    assert tasks[2].wait_for_end() == "COMPLETED"
    assert tasks[2].log.count("finished already") == 6
    assert weights(runs) == weights(undisturbed)


def test_a_second_job_of_a_run_does_not_disturb_the_first(
    cluster: SlurmCluster, recipe_path: Path, runs: Path, undisturbed: Path
) -> None:
    first = start(cluster, recipe_path, runs)
    wait_for_step(first, runs, 12)
    words = ["--nodes=1", "--ntasks-per-node=2", SCRIPT, recipe_path, f"runs={runs}"]
    log = runs.parent / "second.log"
    second = submit(cluster, log, *words, CPT_MERGE_PREFLIGHT="no")
    assert second.wait_for_end() == "FAILED"
    assert f"is in use by job {first.id} on node[1-2] (running)" in second.log
    cluster.slurm("scancel", "--signal=TERM", first.id)
    assert first.wait_for_end() == "COMPLETED", first.log
    assert first.restarts == 1
    assert weights(runs) == weights(undisturbed)


@pytest.mark.parametrize("seconds", [0.1, 0.8, 1.6])
def test_a_job_that_is_cancelled_at_its_very_start_stays_cancelled(
    seconds: float, cluster: SlurmCluster, recipe_path: Path, runs: Path
) -> None:
    job = start(cluster, recipe_path, runs)
    job.wait(lambda: job.state == "RUNNING", "start")
    time.sleep(seconds)
    cluster.slurm("scancel", job.id)
    assert job.wait_for_end() == "CANCELLED", job.log
    time.sleep(8)  # five seconds after a requeue it would be back
    assert (job.state, job.restarts) == ("CANCELLED", 0)


def test_status_shows_the_progress(cluster: SlurmCluster, recipe_path: Path, runs: Path) -> None:
    job = start(cluster, recipe_path, runs, "--time=30")
    wait_for_step(job, runs, 9)
    status = ["-m", "cpt_merge", "status", str(recipe_path), f"runs={runs}"]
    words = [sys.executable, *status]
    shown = re.sub(r"\s+", " ", cluster.slurm(*words))
    assert re.search(
        rf"job {job.id}, running on node\[1-2\], (29|28|27):\d\d left of its time", shown
    ), shown
    assert "stage training" in shown
    assert re.search(r"step \d+ of 48, loss [\d.]+, [\d,]+ tokens/s, \d+ s left", shown), shown
    assert re.search(r"newest checkpoint \S+step-000000(08|16|24|32)", shown), shown
    cluster.slurm("scancel", job.id)
    assert job.wait_for_end() == "CANCELLED"
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert job.restarts == 0  # a cancelled job stays cancelled
    assert rows(runs)
