"""Where the processes meet: what the launcher asked for, process groups, device, mesh."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from cpt_merge.core.errors import UserError
from cpt_merge.core.world import World, find_rendezvous, find_world

EXAMPLES = "recipes/accelerate"
Found = TypeVar("Found")
TIMEOUT = timedelta(
    minutes=60
)  # of a collective: longer than the slowest checkpoint; the watchdog speaks before


@dataclass(frozen=True)
class Asked:
    """The backend that accelerate's configuration asks for, as its launcher passes it on in the environment."""

    backend: Literal["none", "fsdp2", "deepspeed"] = "none"
    replicas: int = 1  # HSDP: groups of processes that each hold the whole model, sharded within
    shards: int | None = (
        None  # FSDP2: processes that share a copy; all that there are in a group if None
    )
    reshard: bool = True  # FSDP2: free a layer's gathered weights after its forward pass
    zero_stage: int = 0
    zero_config: str | None = None  # DeepSpeed's own JSON, whose `zero_optimization` is taken
    mixed_precision: str = "no"  # as accelerate was told; must not contradict the recipe

    def mesh_shape(self, world: World) -> tuple[int, int]:
        """(replicas, shards) of this world. Raises `UserError` if its size does not fit."""
        shards = self.shards or world.size // self.replicas
        if self.replicas * shards != world.size:
            raise UserError(
                f"{world.size} processes do not make {self.replicas} replicas"
                + (f" of {self.shards} shards" if self.shards else "")
                + "; set dp_replicate_size (and dp_shard_size) in the accelerate config so that they multiply to it."
            )
        return self.replicas, shards


def asked_for(environment: Mapping[str, str] = os.environ) -> Asked:
    """What the environment asks for. Raises `UserError` for what is not there, instead of doing something else."""
    mixed = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return _deepspeed(environment, mixed)
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        return _fsdp(environment, mixed)
    if find_world(environment).size > 1:
        raise UserError(
            "several processes were started without a backend; use one of "
            f"{EXAMPLES}/(fsdp2|hsdp|zero1|zero2|zero3).yaml, as accelerate's --config_file or the recipe's "
            "launch.accelerate_config, or one process."
        )
    return Asked(mixed_precision=mixed)


def _fsdp(environment: Mapping[str, str], mixed: str) -> Asked:
    if environment.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            f"the accelerate config asks for FSDP 1; set fsdp_version: 2 as in {EXAMPLES}/fsdp2.yaml."
        )
    if environment.get("FSDP_OFFLOAD_PARAMS") == "true":
        raise UserError(
            "the accelerate config asks for fsdp_offload_params, which is not supported; set it to false."
        )
    if environment.get("FSDP_ACTIVATION_CHECKPOINTING") == "true":
        raise UserError(
            "set the recipe's training.activation_checkpointing instead of fsdp_activation_checkpointing."
        )
    for kind in ("TP", "CP", "SP"):
        if int(environment.get(f"PARALLELISM_CONFIG_{kind}_SIZE") or 1) > 1:
            raise UserError(
                f"the accelerate config asks for {kind.lower()}_size > 1, which is not supported; set it to 1."
            )
    shards = int(environment.get("PARALLELISM_CONFIG_DP_SHARD_SIZE") or 1)
    return Asked(
        "fsdp2",
        replicas=int(environment.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE") or 1),
        shards=shards if shards > 1 else None,
        reshard=environment.get("FSDP_RESHARD_AFTER_FORWARD", "true") != "false",
        mixed_precision=mixed,
    )


def _deepspeed(environment: Mapping[str, str], mixed: str) -> Asked:
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
    return Asked("deepspeed", zero_stage=stage, zero_config=config, mixed_precision=mixed)


@dataclass(frozen=True)
class Parallel:
    """This process among the others."""

    world: World
    asked: Asked
    device: torch.device
    mesh: DeviceMesh  # ("replicate", "shard")
    side_group: dist.ProcessGroup  # gloo, for decisions; never shares a queue with the training
    checkpoint_group: (
        dist.ProcessGroup
    )  # gloo, for checkpoints that are written while training goes on

    def barrier(self) -> None:
        """Wait until all processes are here."""
        dist.barrier(group=self.side_group)

    def any(self, flag: bool) -> bool:
        """True on all processes if it is true on one (law 6)."""
        return bool(self.maximum(float(flag)))

    def maximum(self, value: float) -> float:
        """The largest value over all processes."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def total(self, value: float) -> float:
        """The sum over all processes."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def from_main(self, find: Callable[[], Found]) -> Found:
        """What `find` gives on process 0, for all; the others do not call it."""
        found: list[Any] = [find() if self.world.is_main else None]
        dist.broadcast_object_list(found, src=0, group=self.side_group)
        value: Found = found[0]
        return value

    def as_on_main(self, values: Tensor) -> Tensor:
        """The values that process 0 passes, for all; on the CPU."""
        dist.broadcast(values, src=0, group=self.side_group)
        return values

    def _reduced(self, value: float, operation: dist.ReduceOp.RedOpType) -> float:
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, operation, group=self.side_group)
        return float(tensor)


def start_parallel(timeout: timedelta = TIMEOUT) -> Parallel:
    """Join the other processes. One process alone is a group of one, so that there is one path for all."""
    world, asked = find_world(), asked_for()
    replicas, shards = asked.mesh_shape(world)
    device = _device(world)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world.launcher == "alone":
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        meeting = find_rendezvous(world)
        os.environ.update(
            MASTER_ADDR=meeting.address, MASTER_PORT=str(meeting.port)
        )  # DeepSpeed reads them too
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=timeout)
    mesh = init_device_mesh(device.type, (replicas, shards), mesh_dim_names=("replicate", "shard"))
    for name in (
        "replicate",
        "shard",
    ):  # a mesh makes its groups with torch's own timeout: 10 minutes with NCCL
        _set_pg_timeout(timeout, mesh.get_group(name))
    side, checkpoints = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
    return Parallel(world, asked, device, mesh, side, checkpoints)


def _device(world: World) -> torch.device:
    """The GPU of this process, or the CPU where there is none or accelerate's config says `use_cpu`."""
    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return torch.device("cpu")
    device = torch.device("cuda", gpu_of(world, torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device


def gpu_of(world: World, visible: int) -> int:
    """Which of the `visible` GPUs this process takes. Raises `UserError` if there is none for it."""
    if visible == 1 and world.launcher == "slurm":
        return 0  # `srun --gpus-per-task=1` shows every task its own one only
    if world.local_rank >= visible:
        raise UserError(
            f"process {world.local_rank} of this node has no GPU, {visible} can be seen; start one process per GPU."
        )
    return world.local_rank


def stop_parallel() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()
