"""The backend that accelerate's configuration names, read from the environment; without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cpt_merge.core.errors import UserError
from cpt_merge.core.world import World, find_world

EXAMPLES = "recipes/accelerate"


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
