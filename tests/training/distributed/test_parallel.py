"""The processes of a run: how long they wait for each other, and what one of them decides for all."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from cpt_merge.core.distributed import stop_process_group
from cpt_merge.core.errors import UserError
from cpt_merge.core.world import World
from cpt_merge.training.distributed.parallel import gpu_of, start_parallel
from tests.distributed import run_ranks
from tests.training.runs import ask_for


def timeouts(backend: str) -> set[timedelta]:
    ask_for(backend)
    parallel = start_parallel()
    groups = [dist.group.WORLD, parallel.group, parallel.checkpoint_group]
    groups += [parallel.mesh.get_group(name) for name in ("replicate", "shard")]
    found = {group._get_backend(torch.device("cpu")).options._timeout for group in groups}
    stop_process_group()
    return found


@pytest.mark.parametrize(
    ("backend", "size"), [("fsdp2", 2), pytest.param("hsdp", 4, marks=pytest.mark.slow)]
)
def test_every_group_waits_for_an_hour(backend: str, size: int) -> None:
    assert run_ranks(timeouts, size, backend) == [{timedelta(hours=1)}] * size


def decided() -> str:
    ask_for("fsdp2")
    parallel = start_parallel()
    found = parallel.broadcast(lambda: f"by rank {parallel.world.rank}")
    stop_process_group()
    return found


def test_process_0_decides_for_all() -> None:
    assert run_ranks(decided, 2) == ["by rank 0"] * 2


@pytest.mark.parametrize(("launcher", "local_rank", "visible", "gpu"), [
    ("torchrun", 3, 8, 3), ("slurm", 3, 8, 3), ("slurm", 3, 1, 0), ("torchrun", 0, 1, 0)])  # fmt: skip
def test_each_process_has_its_gpu(launcher: str, local_rank: int, visible: int, gpu: int) -> None:
    """Also where srun shows a task its own one only."""
    assert gpu_of(World(local_rank, 8, local_rank, launcher), visible) == gpu


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="process 4 of this node has no GPU, since 4 are visible"):
        gpu_of(World(4, 8, 4, "torchrun"), 4)
