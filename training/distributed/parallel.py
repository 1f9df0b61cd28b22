"""The processes of a run: the backend that accelerate's configuration names, groups, and device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cpt_merge.core.distributed import Ranks, start_process_group
from cpt_merge.core.errors import UserError
from cpt_merge.core.torch_compat import set_timeout
from cpt_merge.core.world import World, find_world

EXAMPLES = "recipes/accelerate"
# Of a collective: longer than the slowest checkpoint. The watchdog reports long before.
TIMEOUT = timedelta(minutes=60)


@dataclass(frozen=True)
class BackendSettings:
    """The backend that accelerate's configuration names, read from the environment."""

    backend: Literal["none", "fsdp2", "deepspeed"] = "none"
    replicas: int = 1  # HSDP: groups of processes, each of which holds the whole model in shards
    shards: int | None = None  # FSDP2: processes of a group; None: as many as there are
    reshard: bool = True  # FSDP2: free a layer's gathered weights after its forward pass
    zero_stage: int = 0
    zero_config: str | None = None  # DeepSpeed's own JSON, of which `zero_optimization` counts
    mixed_precision: str = "no"  # accelerate's setting; must not contradict the recipe

    def mesh_shape(self, world: World) -> tuple[int, int]:
        """(replicas, shards) of this world. Raises `UserError` if its size does not fit."""
        shards = self.shards or world.size // self.replicas
        if self.replicas * shards != world.size:
            raise UserError(
                f"{world.size} processes do not make {self.replicas} replicas"
                + (f" of {self.shards} shards" if self.shards else "")
                + "; set dp_replicate_size (and dp_shard_size) in the accelerate config "
                "so that their product is the number of processes."
            )
        return self.replicas, shards


def backend_settings(environment: Mapping[str, str] = os.environ) -> BackendSettings:
    """The settings in the environment. Raises `UserError` for those that are not supported."""
    mixed = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return _deepspeed(environment, mixed)
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        return _fsdp(environment, mixed)
    if find_world(environment).size > 1:
        raise UserError(
            "several processes were started without a backend; use one of "
            f"{EXAMPLES}/(fsdp2|hsdp|zero1|zero2|zero3).yaml, as accelerate's --config_file or "
            "the recipe's launch.accelerate_config, or start one process."
        )
    return BackendSettings(mixed_precision=mixed)


def _fsdp(environment: Mapping[str, str], mixed: str) -> BackendSettings:
    if environment.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "the accelerate config asks for FSDP 1; "
            f"set fsdp_version: 2 as in {EXAMPLES}/fsdp2.yaml."
        )
    if environment.get("FSDP_OFFLOAD_PARAMS") == "true":
        raise UserError(
            "the accelerate config asks for fsdp_offload_params, which is not supported; "
            "set it to false."
        )
    if environment.get("FSDP_ACTIVATION_CHECKPOINTING") == "true":
        raise UserError(
            "set the recipe's training.activation_checkpointing "
            "instead of fsdp_activation_checkpointing."
        )
    for kind in ("TP", "CP", "SP"):
        if int(environment.get(f"PARALLELISM_CONFIG_{kind}_SIZE") or 1) > 1:
            raise UserError(
                f"the accelerate config asks for {kind.lower()}_size > 1, "
                "which is not supported; set it to 1."
            )
    shards = int(environment.get("PARALLELISM_CONFIG_DP_SHARD_SIZE") or 1)
    return BackendSettings(
        "fsdp2",
        replicas=int(environment.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE") or 1),
        shards=shards if shards > 1 else None,
        reshard=environment.get("FSDP_RESHARD_AFTER_FORWARD", "true") != "false",
        mixed_precision=mixed,
    )


def _deepspeed(environment: Mapping[str, str], mixed: str) -> BackendSettings:
    for what in ("OPTIMIZER", "PARAM"):
        if environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none") not in (
            "none",
            "",
        ):
            name = f"offload_{what.lower()}_device"
            raise UserError(
                f"the accelerate config asks for {name}, which is not supported; set it to none."
            )
    stage = int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") or 2)
    config = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") or None
    if stage not in (1, 2, 3) and not config:
        raise UserError(
            f"the accelerate config asks for ZeRO stage {stage}; set zero_stage to 1, 2 or 3."
        )
    return BackendSettings("deepspeed", zero_stage=stage, zero_config=config, mixed_precision=mixed)


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


def start_parallel(timeout: timedelta = TIMEOUT) -> Parallel:
    """Join the other processes. One process alone is a group of one, so there is one code path."""
    settings, world = backend_settings(), find_world()
    shape = settings.mesh_shape(world)
    device = _device(world)
    start_process_group("nccl" if device.type == "cuda" else "gloo", timeout)
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


def _device(world: World) -> torch.device:
    """The GPU of this process; the CPU if there is none or accelerate's config says `use_cpu`."""
    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
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
