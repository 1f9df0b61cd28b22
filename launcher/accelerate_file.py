"""accelerate's configuration file: where it is, whether its keys exist, what processes are told."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from cpt_merge.core.errors import UserError
from cpt_merge.core.package import PACKAGE
from cpt_merge.core.spelling import nearest
from cpt_merge.launcher.recipe import Recipe, read_yaml

ACCELERATE_CONFIGS = PACKAGE / "recipes" / "accelerate"
# the sections that say what training does, each with one of its keys: accelerate's parser has
# a group of options for it, which are all that the section may set
_SECTIONS = {
    "fsdp_config": "fsdp_version",
    "deepspeed_config": "zero_stage",
    "parallelism_config": "parallelism_config_dp_shard_size",
}
_BACKENDS = {"fsdp_config": "FSDP", "deepspeed_config": "DEEPSPEED"}  # with which a section counts
USE_CPU = "ACCELERATE_USE_CPU"


def accelerate_config(recipe: Recipe) -> Path:
    """The accelerate configuration file. Raises `UserError` if it is missing or something else."""
    name = recipe.launch.accelerate_config or "fsdp2"
    packaged = {path.stem: path for path in ACCELERATE_CONFIGS.glob("*.yaml")}
    path = packaged.get(name) or Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"launch.accelerate_config = {name} does not exist; leave it out, write one, or name "
            f"one of {', '.join(sorted(packaged))}."
        )
    if "distributed_type" not in _read(path):
        raise UserError(
            f"launch.accelerate_config = {path} has no distributed_type; see {packaged['fsdp2']}."
        )
    return path


def machines(path: Path) -> int:
    """On how many machines `accelerate launch` would start processes.

    Raises `UserError` for what is no number.
    """
    wanted = _read(path).get("num_machines") or 1
    if not str(wanted).isdecimal():
        raise UserError(f"{path}: num_machines is {wanted}, but it must be a whole number.")
    return int(wanted)


def backend_environment(path: Path) -> dict[str, str]:
    """The variables by which `accelerate launch --config_file path` tells processes their backend.

    torchrun and srun do not read the file, so there the processes read it themselves. Only the
    variables that `training.distributed.settings.backend_settings` reads are set. Raises
    `UserError` for a key that accelerate does not know or use, which it would ignore.
    """
    values, kind = _read(path), _kind(path)
    check_keys(path, kind)
    environment = {
        "ACCELERATE_MIXED_PRECISION": str(values.get("mixed_precision") or "no").lower(),
        USE_CPU: str(_uses_cpu(path)),
    }

    told = ["parallelism_config", "dynamo_config"]
    if kind in ("FSDP", "DEEPSPEED"):
        environment[f"ACCELERATE_USE_{kind}"] = "true"
        told.append(f"{kind.lower()}_config")
    elif kind != "NO":
        raise _unsupported(path)
    for section in told:
        for name, value in _section(path, values, section).items():
            if value is not None:
                environment[_variable(section, name)] = str(value)
    return environment


def _uses_cpu(path: Path) -> bool:
    """Whether the processes leave the GPUs alone. Raises `UserError` for what is no such answer."""
    found = _read(path).get("use_cpu") or False
    if not isinstance(found, bool):
        raise UserError(f"{path}: use_cpu is {found!r}, but it must be true or false.")
    return found


def _kind(path: Path) -> str:
    return str(_read(path).get("distributed_type", "NO")).upper()


def _unsupported(path: Path) -> UserError:
    return UserError(
        f"{path} asks for distributed_type {_kind(path)}; set FSDP, DEEPSPEED or 'NO'."
    )


def _variable(section: str, key: str) -> str:
    """The variable that carries a key of a section."""
    name = _full(section, key).upper()
    if section == "deepspeed_config" and not key.startswith("gradient_"):
        return f"ACCELERATE_DEEPSPEED_{name.removeprefix('DEEPSPEED_')}"
    return name if section in ("fsdp_config", "parallelism_config") else f"ACCELERATE_{name}"


def _full(section: str, key: str) -> str:
    """A key with its prefix, which accelerate adds in these two sections."""
    prefix = {"fsdp_config": "fsdp_", "dynamo_config": "dynamo_"}.get(section, "")
    return key if key.startswith(prefix) else prefix + key


def check_keys(path: Path, kind: str) -> None:
    """Raise `UserError` for a key that the installed accelerate does not know.

    accelerate itself ignores one in a section, and the sections of other backends than `kind`.
    """
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    values = _read(path)
    groups = [
        {option.dest for option in group._group_actions}
        for group in launch_command_parser()._action_groups
    ]
    known = {
        section: next(names for names in groups if member in names)
        for section, member in _SECTIONS.items()
    }
    place = values.get("compute_environment") or "LOCAL_MACHINE"
    if place != "LOCAL_MACHINE":
        raise UserError(
            f"{path} asks for compute_environment {place}, which is not supported; set "
            "LOCAL_MACHINE."
        )
    # former names become today's
    top = ClusterConfig.process_config({"distributed_type": "NO", **values})
    _refuse_unknown(path, map(str, top), "", {field.name for field in fields(ClusterConfig)}, known)
    for section, names in known.items():
        found = _section(path, values, section)
        _refuse_unknown(path, found, section, names, known)
        of = _BACKENDS.get(section, kind)
        if of != kind and found:
            raise UserError(
                f"{path} has the section {section}, which counts with distributed_type {of} only, "
                f"but distributed_type is {kind}; remove the section, or set that type."
            )


def _refuse_unknown(
    path: Path,
    given: Iterable[str],
    section: str,
    known: set[str],
    sections: Mapping[str, set[str]],
) -> None:
    """Raise `UserError` for the first key that is not known in a section, or at the top."""
    for name in given:
        if name in known or _full(section, name) in known:
            continue
        homes = [home for home, names in sections.items() if name in names]
        hint = f", which belongs in {homes[0]}" if homes else nearest(_full(section, name), known)
        raise UserError(
            f"{path}: accelerate has no key {f'{section}.{name}' if section else name}{hint}; "
            "correct it or remove it."
        )


def _section(path: Path, values: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name) or {}
    if not isinstance(found, dict):
        raise UserError(f"{path}: {name} is {found!r}, but it must be a mapping of keys.")
    return {str(key): value for key, value in found.items()}


def _read(path: Path) -> dict[str, Any]:
    return read_yaml(path, "accelerate configuration")


def check_accepted(path: Path, processes: int) -> None:
    """Raise `UserError` if `accelerate launch` would refuse the file for so many processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = ["--config_file", str(path), "--num_processes", str(processes)]
    anything = ["--main_process_port", "0", "-m", "module"]
    try:
        settings, _, _ = _validate_launch_command(
            launch_command_parser().parse_args([*words, *anything])
        )
        settings.deepspeed_fields_from_accelerate_config = ""
        (prepare_deepspeed_cmd_env if settings.use_deepspeed else prepare_multi_gpu_env)(settings)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"`accelerate launch` refuses {path} ({reason}); correct it.") from None


def apply_launched_file() -> None:
    """Check the keys of the file of the `accelerate launch` that started this process.

    `use_cpu`, which accelerate does not pass on to the processes of FSDP and DeepSpeed, is applied.
    The file's name is not passed on, so it is looked for on the command line in /proc. Raises
    `UserError` as `backend_environment` does.
    """
    path = _launched_file(Path(f"/proc/{os.getppid()}/cmdline"))
    if path and path.is_file():
        asked = [kind for kind in _BACKENDS.values() if f"ACCELERATE_USE_{kind}" in os.environ]
        check_keys(path, *(asked or [_kind(path)]))  # options may ask for another than the file
        if _kind(path) == "MULTI_CPU":  # accelerate starts one process, however many it asks for
            raise _unsupported(path)
        os.environ.setdefault(USE_CPU, str(_uses_cpu(path)))


def _launched_file(command_line: Path) -> Path | None:
    """The file that `accelerate launch` reads; None if the command is another one."""
    from accelerate.commands.config.config_args import default_config_file

    try:
        words = command_line.read_text(encoding="utf-8").split("\0")
    except (OSError, UnicodeDecodeError):
        return None
    if not any("accelerate" in word for word in words[:3]):
        return None
    for word, following in pairwise(words):
        option, _, value = word.partition("=")
        if option in ("--config_file", "--config-file"):
            return Path(value or following)
    return Path(default_config_file)
