"""The backend that accelerate's configuration names, read from the environment; without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cpt_merge.core.errors import UserError
from cpt_merge.core.world import World, find_world
from cpt_merge.training.config import Offload

EXAMPLES = "recipes/accelerate"
OFFLOAD_SECTIONS = ("offload_optimizer", "offload_param")  # of DeepSpeed's zero_optimization
_CAN = {"optimizer": "zero2 or zero3", "all": "fsdp2 or zero3"}
_OFFLOADED = {"optimizer": "the optimizer", "all": "weights, gradients and optimizer"}


@dataclass(frozen=True)
class BackendSettings:
    """The backend that accelerate's configuration names, read from the environment."""

    backend: Literal["none", "fsdp2", "deepspeed"] = "none"
    replicas: int = 1  # HSDP: groups of processes, each of which holds the whole model in shards
    shards: int | None = None  # FSDP2: processes of a group; None: as many as there are
    reshard: bool = True  # FSDP2: free a layer's gathered weights after its forward pass
    zero_stage: int = 0
    zero: Mapping[str, Any] = field(default_factory=dict)  # more of DeepSpeed's zero_optimization
    offload: Offload = "none"  # what is kept in the CPU's memory
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

    @property
    def zero_section(self) -> dict[str, Any]:
        """DeepSpeed's `zero_optimization`."""
        return {"stage": self.zero_stage, **self.zero}

    def with_offload(self, wanted: Offload | None) -> BackendSettings:
        """The settings with what the recipe's `training.offload` adds to them.

        Raises `UserError` if the two contradict each other, or if the backend cannot do it.
        """
        asked = self
        if wanted is not None and wanted != self.offload:
            if self.offload != "none":
                raise UserError(
                    f"training.offload is {wanted} but the accelerate config asks to offload "
                    f"{_OFFLOADED[self.offload]}; set both alike, or only one of them."
                )
            parts = {"none": (), "optimizer": OFFLOAD_SECTIONS[:1], "all": OFFLOAD_SECTIONS}
            sections = {name: {"device": "cpu"} for name in parts[wanted]}
            zero = {**self.zero, **sections} if self.backend == "deepspeed" else self.zero
            asked = replace(self, offload=wanted, zero=zero)
        _check_offload(asked)
        return asked


def _check_offload(asked: BackendSettings) -> None:
    """Raise `UserError` for what a backend cannot keep in the CPU's memory."""
    if asked.offload == "none":
        return
    if asked.backend == "none":
        raise UserError(
            f"training.offload: {asked.offload} needs FSDP2 or DeepSpeed, on one process too; set "
            f"launch.accelerate_config to {_CAN[asked.offload]}."
        )
    if asked.backend == "fsdp2" and asked.offload != "all":
        raise UserError(
            "training.offload: optimizer is not possible with FSDP2, which offloads weights, "
            "gradients and optimizer together; set all, or use DeepSpeed "
            f"({EXAMPLES}/zero2-offload.yaml)."
        )
    if asked.backend == "deepspeed" and asked.offload == "all" and asked.zero_stage < 3:
        raise UserError(
            f"the weights cannot be offloaded with ZeRO {asked.zero_stage}, which runs with whole "
            "ones; use ZeRO 3 or FSDP2, or offload the optimizer alone."
        )


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
        offload="all" if environment.get("FSDP_OFFLOAD_PARAMS") == "true" else "none",
        mixed_precision=mixed,
    )


def _deepspeed(environment: Mapping[str, str], mixed: str) -> BackendSettings:
    config = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") or None
    stage = int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") or 2)
    zero = _zero_of(config) if config else {}
    stage = zero.pop("stage", stage)
    if stage not in (1, 2, 3):
        raise UserError(
            f"the accelerate config asks for ZeRO stage {stage}; set zero_stage to 1, 2 or 3."
        )
    for name in OFFLOAD_SECTIONS:
        section = {**_offload_keys(environment, name), **(zero.pop(name, None) or {})}
        if section.get("device", "none") != "none":
            zero[name] = section
    return BackendSettings(
        "deepspeed",
        zero_stage=stage,
        zero=zero,
        offload=_offload_of(zero),
        mixed_precision=mixed,
    )


def _zero_of(config: str) -> dict[str, Any]:
    """`zero_optimization` of DeepSpeed's own JSON; accelerate's "auto" is DeepSpeed's default.

    Raises `UserError` for a file without a stage.
    """
    try:
        section = json.loads(Path(config).read_text(encoding="utf-8"))["zero_optimization"]
        if section["stage"] not in (1, 2, 3):
            raise ValueError(f"stage is {section['stage']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the DeepSpeed configuration {config} gives no ZeRO stage of 1, 2 or 3 "
            f"({error}); set zero_optimization.stage there."
        ) from None
    former = [name for name in section if name.startswith("cpu_offload")]
    if former:
        raise UserError(
            f"{config} sets {former[0]}, a former name of DeepSpeed's; set offload_optimizer (and "
            'offload_param) to {"device": "cpu"} instead.'
        )
    return {name: _without_auto(value) for name, value in section.items() if value != "auto"}


def _without_auto(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: inner for name, inner in value.items() if inner != "auto"}


def _offload_keys(environment: Mapping[str, str], name: str) -> dict[str, str]:
    """One of DeepSpeed's offload sections, as accelerate's keys give it."""
    prefix = f"ACCELERATE_DEEPSPEED_{name.upper()}"
    keys = {"device": f"{prefix}_DEVICE", "nvme_path": f"{prefix}_NVME_PATH"}
    found = {short: environment.get(variable, "") for short, variable in keys.items()}
    return {short: value for short, value in found.items() if value.lower() not in ("", "none")}


def _offload_of(zero: Mapping[str, Any]) -> Offload:
    """What DeepSpeed's sections move to the CPU. Raises `UserError` for what makes no sense."""
    optimizer, weights = (name in zero for name in OFFLOAD_SECTIONS)
    if weights and not optimizer:
        raise UserError(
            "the accelerate config asks for offload_param without offload_optimizer, whose share "
            "of the memory is six times as large; set the device of both."
        )
    return "all" if weights else "optimizer" if optimizer else "none"
