"""A stop in the middle of the other stages, and a node that the preflight finds bad."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster, submit
from tests.slurm.jobs import MODELS, SCRIPT, differing, start, weights

pytestmark = pytest.mark.slurm

STOPPED = ("tokenizer", "data", "evaluation")  # the others take a second or two


def test_a_signal_in_any_stage_costs_at_most_that_stage(
    cluster: SlurmCluster, recipe_path: Path, tmp_path: Path, by_sbatch: tuple[Path, object]
) -> None:
    runs = tmp_path / "runs"
    words = ["--nodes=2", "--ntasks-per-node=2", SCRIPT, recipe_path, f"runs={runs}"]
    job = submit(cluster, tmp_path / "job.log", *words, CPT_MERGE_PREFLIGHT="no")
    for count, stage in enumerate(STOPPED, 1):
        begun, done = (
            runs / "demo" / stage / "log" / "run.json",
            runs / "demo" / stage / "stage.json",
        )
        job.wait(begun.is_file, f"{stage} stage")
        assert not done.exists()
        cluster.slurm("scancel", "--signal=TERM", job.id)
        job.wait(lambda count=count: job.restarts == count, "requeue")
        assert not done.exists()
    assert job.wait_for_end() == "COMPLETED", job.log
    for model in MODELS:
        assert not differing(by_sbatch[0] / model, runs / "demo" / model)


def test_a_bad_node_is_named_and_left_out_where_allowed(
    cluster: SlurmCluster, recipe_path: Path, runs: Path, undisturbed: Path
) -> None:
    """The first node's temporary disk is nearly full. The batch script runs there."""
    temporary = runs.parent / "tmp"
    temporary.mkdir()
    mounted = cluster.on("node1", "mount", "-t", "tmpfs", "-o", "size=100m", "none", str(temporary))
    assert mounted.returncode == 0, mounted.stderr
    environment = {"nodes": "3", "preflight": "yes", "TMPDIR": str(temporary)}
    try:
        refused = start(cluster, recipe_path, runs, **environment)
        assert refused.wait_for_end() == "FAILED"
        assert "BAD   node1: " in refused.log
        assert "preflight: node1 cannot be used" in refused.log
        assert refused.restarts == 0  # another start would say the same
        assert refused.fields["ExitCode"] == "2:0"
        refused.log_path.unlink()
        job = start(cluster, recipe_path, runs, **environment, more=["launch.spare_nodes=1"])
        assert job.wait_for_end() == "COMPLETED", job.log
    finally:
        cluster.on("node1", "umount", str(temporary))
    assert "preflight: continuing without node1 (launch.spare_nodes = 1)" in job.log
    logs = (runs / "demo" / "slurm").glob(f"{job.id}-0/train-*.log")
    assert {path.name.split("-")[-1] for path in logs} == {"node2.log", "node3.log"}
    assert weights(runs) == weights(undisturbed)
