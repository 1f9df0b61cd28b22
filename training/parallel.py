"""Where the processes meet: process groups, device, mesh, FSDP2; and the proof that what was asked for is active."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from core.errors import UserError
from core.world import World, find_world
from training.config import TrainingConfig
from training.model import CausalLM


@dataclass(frozen=True)
class Parallel:
    """This process among the others."""

    world: World
    device: torch.device
    mesh: DeviceMesh
    side_group: dist.ProcessGroup  # gloo, for decisions and checkpoints; never shares a queue with the training

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

    def _reduced(self, value: float, operation: dist.ReduceOp.RedOpType) -> float:
        tensor = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(tensor, operation, group=self.side_group)
        return float(tensor)


def asked_for_fsdp2() -> bool:
    """Whether the launcher asked for sharding. Raises `UserError` for a backend that is not there."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UserError("DeepSpeed is not a backend yet; use recipes/accelerate/fsdp2.yaml.")
    asked = os.environ.get("ACCELERATE_USE_FSDP")
    if asked == "true" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "the accelerate config asks for FSDP 1; set fsdp_version: 2 as in recipes/accelerate/fsdp2.yaml."
        )
    under_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if under_accelerate and asked != "true" and find_world().size > 1:
        raise UserError(
            "the accelerate config starts several processes without FSDP; "
            "use recipes/accelerate/fsdp2.yaml, or one process."
        )
    return asked == "true"


def start_parallel() -> Parallel:
    """Join the other processes. One process alone is a group of one, so that there is one path for all."""
    world = find_world()
    asked_for_fsdp2()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", world.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend, timeout = "nccl" if cuda else "gloo", timedelta(minutes=10)
    if world.launcher != "alone" and not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        raise UserError(
            "MASTER_ADDR and MASTER_PORT are not both set; start by slurm/cpt_merge.sh, torchrun or accelerate."
        )
    if world.launcher == "alone":
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=timeout)
    mesh = init_device_mesh(device.type, (world.size,), mesh_dim_names=("shard",))
    return Parallel(world, device, mesh, dist.new_group(backend="gloo"))


def stop_parallel() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def parallelise(module: CausalLM, config: TrainingConfig, parallel: Parallel) -> CausalLM:
    """Activation checkpointing, compile, then FSDP2, in this order, on a model whose parameters are still meta tensors.

    Each decoder layer is one unit; embedding, final norm and head are one with the root, so that a tied matrix lies in
    one unit only. Parameters are fp32 masters (or bf16 for pure-bf16), gathered in the compute type.
    """
    if config.activation_checkpointing:
        module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compute = torch.float32 if config.precision == "fp32" else torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in module.layers:
        if config.compile:
            layer.compile()
        fully_shard(layer, mesh=parallel.mesh, mp_policy=policy)
    fully_shard(module, mesh=parallel.mesh, mp_policy=policy)
    _prove_sharded(module, parallel)
    return module


def _prove_sharded(module: CausalLM, parallel: Parallel) -> None:
    """Law 7: what was asked for is active, or the run stops."""
    plain = [name for name, parameter in module.named_parameters() if not isinstance(parameter, DTensor)]
    if plain or not isinstance(module, FSDPModule) or dist.get_world_size() != parallel.world.size:
        raise UserError(f"FSDP2 was asked for but is not active (unsharded: {plain[:3]}); report this with the log.")
