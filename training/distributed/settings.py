"""The backend that accelerate's configuration names, read from the environment; without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from cpt_merge.core.errors import UserError
from cpt_merge.core.spelling import nearest
from cpt_merge.core.world import World
from cpt_merge.training.config import Offload, TrainingConfig
from cpt_merge.training.distributed.agreement import (
    ACCELERATE,
    FileValue,
    check_equal,
    values_of,
)

EXAMPLES = "recipes/accelerate"
OFFLOAD_SECTIONS = ("offload_optimizer", "offload_param")  # of DeepSpeed's zero_optimization
_OFFLOADED = {
    "none": "nothing",
    "optimizer": "the optimizer",
    "all": "weights, gradients and optimizer",
}
_OFFLOADS = {"optimizer": "DeepSpeed", "all": "FSDP2 or ZeRO 3"}  # who can
_FILES = {"optimizer": "zero1, zero2 or zero3", "all": "fsdp2 or zero3"}
_OF_THE_RECIPE = {  # what the recipe decides, with its key
    "FSDP_ACTIVATION_CHECKPOINTING": "training.activation_checkpointing",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "training.offload_activations",
}
_WHAT_FSDP2_DOES = ("FULL_SHARD", "1")  # of FSDP 1's strategies, as accelerate passes them
_TRUE, _FALSE = ("1", "on", "t", "true", "y", "yes"), ("0", "off", "f", "false", "n", "no")


@dataclass(frozen=True)
class BackendSettings:
    """The backend that accelerate's configuration names, read from the environment."""

    backend: Literal["none", "fsdp2", "deepspeed"] = "none"
    replicas: int = 1  # HSDP: groups of processes, each of which holds the whole model in shards
    shards: int | None = None  # FSDP2: processes of a group; None: as many as there are
    reshard: bool = True  # FSDP2: free a layer's gathered weights after its forward pass
    zero_stage: int = 0
    zero: Mapping[str, Any] = field(default_factory=dict)  # more of DeepSpeed's zero_optimization
    others: tuple[FileValue, ...] = ()  # what else the files set, which the recipe decides
    offload: Offload = "none"  # what is kept in the CPU's memory
    mixed_precision: str = "no"  # accelerate's setting; must not contradict the recipe
    use_cpu: bool = False  # leave the GPUs alone

    def mesh_shape(self, world: World) -> tuple[int, int]:
        """(replicas, shards) of this world. Raises `UserError` if its size does not fit."""
        if self.backend == "none" and world.size > 1:
            raise UserError(
                f"{world.size} processes need a backend, and the accelerate config names none; use "
                f"one of {EXAMPLES}/(fsdp2|hsdp|zero1|zero2|zero3).yaml, as accelerate's "
                "--config_file or the recipe's launch.accelerate_config, or start one process."
            )
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

    def agreed(self, config: TrainingConfig) -> BackendSettings:
        """The settings with what the recipe adds to them.

        Raises `UserError` if the two contradict each other, or if the backend cannot do it.
        """
        asked, precision = self.with_offload(config.offload), config.precision
        wanted = {"bf16": "bf16", "pure-bf16": "bf16", "fp32": "no"}[precision]
        if self.mixed_precision not in ("no", wanted):
            raise UserError(
                f"the accelerate config asks for mixed_precision: {self.mixed_precision} but "
                f"training.precision is {precision}; set mixed_precision: 'no' there, since the "
                "recipe decides."
            )
        if self.backend == "deepspeed" and precision == "pure-bf16":
            raise UserError(
                "training.precision: pure-bf16 is not possible with DeepSpeed, which keeps fp32 "
                "masters; set bf16 or fp32."
            )
        check_equal(self.others, config)
        return asked

    def with_offload(self, wanted: Offload | None) -> BackendSettings:
        """The settings with what the recipe's `training.offload` adds to them.

        Raises `UserError` if the two contradict each other, or if the backend cannot do it.
        """
        if self.offload != "none":  # by the file alone
            self._check_offload(self.offload)
        if wanted is None or wanted == self.offload:
            return self
        self._check_offload(wanted)
        if self.offload != "none":
            raise UserError(
                f"training.offload: {wanted} would offload {_OFFLOADED[wanted]}, but the "
                f"accelerate config asks to offload {_OFFLOADED[self.offload]}; leave "
                "training.offload out, or remove the offloading from the accelerate config."
            )
        parts = {"none": (), "optimizer": OFFLOAD_SECTIONS[:1], "all": OFFLOAD_SECTIONS}
        sections = {name: {"device": "cpu"} for name in parts[wanted]}
        zero = {**self.zero, **sections} if self.backend == "deepspeed" else self.zero
        return replace(self, offload=wanted, zero=zero)

    def _check_offload(self, wanted: Offload) -> None:
        """Raise `UserError` for what the backend cannot keep in the CPU's memory."""
        if wanted == "none":
            return
        others = f"set launch.accelerate_config to {_FILES[wanted]}"
        if self.backend == "none":
            raise UserError(
                f"training.offload: {wanted} needs {_OFFLOADS[wanted]}, on one process too; "
                f"{others}, or leave training.offload out."
            )
        if self.backend == "fsdp2" and wanted == "optimizer":
            raise UserError(
                "training.offload: optimizer is not possible with FSDP2, which offloads weights, "
                f"gradients and optimizer together; set all, or {others}."
            )
        if self.backend == "deepspeed" and wanted == "all" and self.zero_stage < 3:
            raise UserError(
                f"the weights cannot be offloaded with ZeRO {self.zero_stage}, which runs with "
                f"whole ones; offload the optimizer alone, or {others}."
            )


def backend_settings(environment: Mapping[str, str] = os.environ) -> BackendSettings:
    """The settings in the environment. Raises `UserError` for those that are not supported."""
    found = replace(_settings(environment), use_cpu=_flag(environment, "ACCELERATE_USE_CPU"))
    dynamo = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if dynamo == "no":
        return found
    compiled = FileValue(ACCELERATE, "dynamo_config.dynamo_backend", dynamo)
    return replace(found, others=(compiled, *found.others))


def _settings(environment: Mapping[str, str]) -> BackendSettings:
    fsdp = environment.get("ACCELERATE_USE_FSDP") == "true"
    for kind in ("tp", "cp", "sp", *(() if fsdp else ("dp_replicate", "dp_shard"))):
        if _number(environment, f"PARALLELISM_CONFIG_{kind.upper()}_SIZE", 1, least=1) > 1:
            without = " without FSDP2" if kind.startswith("dp") else ""
            raise UserError(
                f"the accelerate config asks for parallelism_config_{kind}_size > 1, which is not "
                f"supported{without}; set it to 1."
            )
    mixed = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return _deepspeed(environment, mixed)
    if fsdp:
        return _fsdp(environment, mixed)
    return BackendSettings(mixed_precision=mixed)


def _fsdp(environment: Mapping[str, str], mixed: str) -> BackendSettings:
    if environment.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "the accelerate config asks for FSDP 1; "
            f"set fsdp_version: 2 as in {EXAMPLES}/fsdp2.yaml."
        )
    for asked, ours in _OF_THE_RECIPE.items():
        if _flag(environment, asked):
            raise UserError(f"set the recipe's {ours} instead of {asked.lower()}.")
    former = environment.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD")
    if former.upper() not in _WHAT_FSDP2_DOES:
        raise UserError(
            f"the accelerate config sets fsdp_sharding_strategy to {former}, which FSDP 2 ignores; "
            "remove it, and set fsdp_reshard_after_forward: false (for SHARD_GRAD_OP) or "
            "dp_replicate_size of parallelism_config (for HYBRID_SHARD) instead."
        )
    shards = _number(environment, "PARALLELISM_CONFIG_DP_SHARD_SIZE", 1, least=1)
    return BackendSettings(
        "fsdp2",
        replicas=_number(environment, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE", 1, least=1),
        shards=shards if shards > 1 else None,
        reshard=_flag(environment, "FSDP_RESHARD_AFTER_FORWARD", True),
        offload="all" if _flag(environment, "FSDP_OFFLOAD_PARAMS") else "none",
        mixed_precision=mixed,
    )


def _number(environment: Mapping[str, str], name: str, default: int, least: int = 0) -> int:
    """A whole number of at least `least`. Raises `UserError` for anything else."""
    text = environment.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise UserError(
            f"{_key(name)} of the accelerate config is {text}, but it must be a whole number of at "
            f"least {least}."
        )
    return int(text)


def _flag(environment: Mapping[str, str], name: str, default: bool = False) -> bool:
    """True or false, as accelerate understands it. Raises `UserError` for anything else."""
    text = environment.get(name, str(default)).lower()
    if text not in _TRUE + _FALSE:
        raise UserError(
            f"{_key(name)} of the accelerate config is {text}, but it must be true or false."
        )
    return text in _TRUE


def _key(variable: str) -> str:
    """The key of accelerate's file from which a variable comes."""
    return variable.removeprefix("ACCELERATE_DEEPSPEED_").lower()


def _deepspeed(environment: Mapping[str, str], mixed: str) -> BackendSettings:
    config = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    file = _read_file(config) if config not in ("", "none") else {}
    zero = file.pop("zero_optimization", {})
    stage = _number(environment, "ACCELERATE_DEEPSPEED_ZERO_STAGE", zero.get("stage", 2))
    if stage not in (1, 2, 3):
        raise UserError(
            f"the accelerate config asks for ZeRO stage {stage}; set zero_stage to 1, 2 or 3."
        )
    if zero.pop("stage", stage) != stage:
        raise UserError(
            f"the accelerate config asks for ZeRO {stage} and {config} for another stage; remove "
            "zero_stage from the accelerate config."
        )
    for name in OFFLOAD_SECTIONS:
        told, section = _offload_keys(environment, name), zero.pop(name, None) or {}
        for key in told.keys() & section.keys():
            if told[key] != section[key]:
                raise UserError(
                    f"the accelerate config sets {name}_{key} to {told[key]} but {config} sets "
                    f"{name}.{key} to {section[key]}; remove one of them."
                )
        section = {**told, **section}
        if section.get("device", "none") != "none":
            zero[name] = section
    return BackendSettings(
        "deepspeed",
        zero_stage=stage,
        zero=zero,
        others=(*_trained(environment), *values_of(str(config), file)),
        offload=_offload_of(zero),
        mixed_precision=mixed,
    )


def _trained(environment: Mapping[str, str]) -> Iterator[FileValue]:
    """What accelerate's own keys for DeepSpeed say about training."""
    for name in ("gradient_clipping", "gradient_accumulation_steps"):
        text = environment.get(f"ACCELERATE_{name.upper()}", "auto").lower()
        if text not in ("auto", "none"):
            yield FileValue(ACCELERATE, name, text)


def _read_file(config: str) -> dict[str, Any]:
    """DeepSpeed's own JSON; accelerate's "auto" is DeepSpeed's default.

    Raises `UserError` for a file without a stage, or with a key that DeepSpeed does not know.
    """
    try:
        text = Path(config).read_text(encoding="utf-8")
        settings = json.loads(text, object_pairs_hook=_without_repeated)
    except OSError as error:
        raise UserError(
            f"the DeepSpeed configuration {config} cannot be read ({error.strerror}); correct "
            "deepspeed_config_file in the accelerate config."
        ) from None
    except ValueError as error:
        raise UserError(
            f"the DeepSpeed configuration {config} is not JSON ({error}); correct it."
        ) from None
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if not isinstance(zero, dict) or type(stage) is not int or stage not in (1, 2, 3):
        raise UserError(
            f"the DeepSpeed configuration {config} gives no ZeRO stage of 1, 2 or 3 "
            f"({json.dumps(stage)}); set zero_optimization.stage there."
        )
    for name in OFFLOAD_SECTIONS:
        if not isinstance(zero.get(name) or {}, dict) and zero[name] != "auto":
            raise UserError(
                f"{config}: zero_optimization.{name} is {json.dumps(zero[name])}, but it must be "
                'an object such as {"device": "cpu"}.'
            )
    former = [name for name in zero if name.startswith("cpu_offload")]
    if former:
        raise UserError(
            f"{config} sets {former[0]}, a former name of DeepSpeed's; set offload_optimizer (and "
            'offload_param) to {"device": "cpu"} instead.'
        )
    if find_spec("deepspeed"):
        from cpt_merge.training.distributed.deepspeed_compat import unknown_keys

        for name, known in unknown_keys(settings):
            raise UserError(
                f"{config}: DeepSpeed has no key {name}{nearest(name, known)}; correct it or "
                "remove it."
            )
    return {name: _without_auto(value) for name, value in settings.items() if value != "auto"}


def _without_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises `ValueError` for a repeated key, of which json would take the last."""
    found = dict(pairs)
    for name in found:
        if sum(name == one for one, _ in pairs) > 1:
            raise ValueError(f"the key {name} occurs twice")
    return found


def _without_auto(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _without_auto(inner) for name, inner in value.items() if inner != "auto"}


def _offload_keys(environment: Mapping[str, str], name: str) -> dict[str, str]:
    """One of DeepSpeed's offload sections, as accelerate's keys give it."""
    prefix = f"ACCELERATE_DEEPSPEED_{name.upper()}"
    keys = {"device": f"{prefix}_DEVICE", "nvme_path": f"{prefix}_NVME_PATH"}
    found = {short: environment.get(variable, "") for short, variable in keys.items()}
    found["device"] = found["device"].lower()
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
