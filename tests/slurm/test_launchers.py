"""torchrun and accelerate inside sbatch, as in docs/slurm.md: stopped, resubmitted, same bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster, submit
from tests.slurm.jobs import wait_for_step, weights

pytestmark = pytest.mark.slurm

LAUNCHERS = {
    "torchrun": (
        "-m torch.distributed.run --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d"
        " --rdzv-id=$SLURM_JOB_ID --rdzv-endpoint=$FIRST:29400 -m cpt_merge.training $RECIPE"
    ),
    "accelerate": (
        "-m accelerate.commands.launch --config_file recipes/accelerate/fsdp2.yaml --num_machines 2"
        " --num_processes 4 --machine_rank $SLURM_NODEID --main_process_ip $FIRST"
        " --main_process_port 29400 -m cpt_merge.training $RECIPE"
    ),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_inside_sbatch(
    launcher: str, cluster: SlurmCluster, recipe_path: Path, runs: Path, undisturbed: Path
) -> None:
    """One task per node starts the node's processes. The job is submitted again after a stop."""
    script = runs.parent / "job.sh"
    script.write_text(
        "#!/usr/bin/env bash\n"
        "export FIRST=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)\n"
        "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300\n"
        f'export RECIPE="{recipe_path} runs={runs}"\n'
        "trap : TERM\n"
        "srun --ntasks-per-node=1 --kill-on-bad-exit=0 "
        f"bash -c '{sys.executable} {LAUNCHERS[launcher]}'\n"
    )
    first = submit(cluster, runs.parent / "1.log", "--nodes=2", "--cpus-per-task=4", script)
    wait_for_step(first, runs, 12)
    cluster.slurm("scancel", "--signal=TERM", first.id)
    first.wait_for_end()
    assert "training stopped after step" in first.log, first.log
    second = submit(cluster, runs.parent / "2.log", "--nodes=2", "--cpus-per-task=4", script)
    assert second.wait_for_end() == "COMPLETED", second.log
    assert "training: continues from step-" in second.log
    assert "FSDP2: 4 shards, 4 processes" in second.log
    assert weights(runs) == weights(undisturbed)
