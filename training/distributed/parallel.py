"""The processes of a run: their groups, their mesh, and the device of each."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cpt_merge.core.distributed import Ranks, start_process_group
from cpt_merge.core.errors import UserError
from cpt_merge.core.heap import keep_freed_memory
from cpt_merge.core.torch_compat import set_timeout
from cpt_merge.core.world import World, find_world
from cpt_merge.training.config import Offload
from cpt_merge.training.distributed.offload import use_cores
from cpt_merge.training.distributed.settings import BackendSettings, backend_settings

# Of a collective: longer than the slowest checkpoint. The watchdog reports long before.
TIMEOUT = timedelta(minutes=60)


@dataclass(frozen=True, kw_only=True)
class Parallel(Ranks):
    """This process among all, with its device and the groups that training needs.

    `group`, which decides, is a gloo group that never shares a queue with the training.
    """

    settings: BackendSettings
    device: torch.device
    mesh: DeviceMesh  # ("replicate", "shard")
    checkpoint_group: dist.ProcessGroup  # gloo, for checkpoints written while training continues

    def broadcast_tensor(self, values: Tensor) -> Tensor:
        """The values that rank 0 passes, on every process; on the CPU."""
        dist.broadcast(values, src=0, group=self.group)
        return values


def start_parallel(timeout: timedelta = TIMEOUT, offload: Offload | None = None) -> Parallel:
    """Join the other processes. One process alone is a group of one, so there is one code path.

    `offload` is the recipe's `training.offload`.
    """
    settings, world = backend_settings().with_offload(offload), find_world()
    shape = settings.mesh_shape(world)
    device = _device(world, settings)
    if device.type == "cpu":
        keep_freed_memory()
    elif settings.offload != "none":
        use_cores()
    start_process_group(_collectives(settings, device), timeout)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    for name in ("replicate", "shard"):
        set_timeout(mesh.get_group(name), timeout)
    side, checkpoints = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    return Parallel(
        world=world,
        group=side,
        settings=settings,
        device=device,
        mesh=mesh,
        checkpoint_group=checkpoints,
    )


def _collectives(settings: BackendSettings, device: torch.device) -> str:
    """The backend of torch's collectives."""
    if device.type != "cuda":
        return "gloo"
    if settings.backend == "fsdp2" and settings.offload == "all":
        return "cpu:gloo,cuda:nccl"  # norms are added up where the gradients are
    return "nccl"


def _device(world: World, settings: BackendSettings) -> torch.device:
    """The GPU of this process; the CPU if there is none or accelerate's config says `use_cpu`."""
    if settings.use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", gpu_of(world, torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device


def gpu_of(world: World, visible: int) -> int:
    """Which of the `visible` GPUs this process takes. Raises `UserError` if none is left for it."""
    if visible == 1 and world.launcher == "slurm":
        return 0  # with `srun --gpus-per-task=1` every task sees only its own
    if world.local_rank >= visible:
        raise UserError(
            f"process {world.local_rank} of this node has no GPU, since {visible} are visible; "
            "start one process per GPU."
        )
    return world.local_rank
