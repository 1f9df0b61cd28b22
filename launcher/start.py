"""Starting a stage in several processes on this machine: `accelerate launch`, called from here."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from cpt_merge.core.errors import Interrupted, UserError
from cpt_merge.core.package import PACKAGE
from cpt_merge.core.progress import counted, say
from cpt_merge.core.world import World, find_world
from cpt_merge.launcher.recipe import Recipe, read_yaml
from cpt_merge.launcher.stage import StageContext

READ_BY_US = "CPT_MERGE_READ_ACCELERATE_CONFIG"  # set where we did accelerate's work
ACCELERATE_CONFIGS = PACKAGE / "recipes" / "accelerate"


def local_processes(recipe: Recipe) -> int:
    """How many processes a distributed stage gets on this machine.

    Raises `UserError` for more than fit.
    """
    import torch

    gpus = torch.cuda.device_count()
    places, kind = (gpus, "GPU") if gpus else (os.cpu_count() or 1, "CPU core")
    wanted = recipe.launch.processes or (gpus or 1)
    if wanted > places:
        raise UserError(
            f"launch.processes = {wanted} but this machine has {counted(places, kind)}; lower it."
        )
    return wanted


def check_local_batch(recipe: Recipe) -> int:
    """The processes of this machine.

    Raises `UserError` if a batch or the backend's mesh does not divide over them.
    """
    world = find_world()
    processes = local_processes(recipe) if world.launcher == "alone" else world.size
    recipe.training.check_processes(processes, " of this machine (launch.processes)")
    if world.launcher == "alone" and not started_by_accelerate():
        from cpt_merge.training.distributed.settings import backend_settings

        ranks = {"RANK": "0", "WORLD_SIZE": str(processes), "LOCAL_RANK": "0"}
        asked = backend_settings(backend_environment(accelerate_config(recipe)) | ranks)
        asked.mesh_shape(World(size=processes))
    return processes


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
    if "distributed_type" not in read_yaml(path):
        raise UserError(
            f"launch.accelerate_config = {path} has no distributed_type; see {packaged['fsdp2']}."
        )
    return path


def backend_environment(path: Path) -> dict[str, str]:
    """The variables by which `accelerate launch --config_file path` tells processes their backend.

    torchrun and srun do not read the file, so there the processes read it themselves. Only the
    variables that `training.distributed.settings.backend_settings` reads are set.
    """
    values = read_yaml(path)
    kind = str(values.get("distributed_type", "NO")).upper()
    environment = {
        "ACCELERATE_MIXED_PRECISION": str(values.get("mixed_precision", "no")).lower(),
        "ACCELERATE_USE_CPU": str(values.get("use_cpu", False)),
    }
    if kind == "FSDP":
        environment["ACCELERATE_USE_FSDP"] = "true"
        for name, value in values.get("fsdp_config", {}).items():
            environment[name.upper()] = str(value).lower()
        for name, value in values.get("parallelism_config", {}).items():
            environment[name.upper()] = str(value)
    elif kind == "DEEPSPEED":
        environment["ACCELERATE_USE_DEEPSPEED"] = "true"
        for name, value in values.get("deepspeed_config", {}).items():
            known = {"deepspeed_config_file": "CONFIG_FILE"}.get(name, name.upper())
            environment[f"ACCELERATE_DEEPSPEED_{known}"] = str(value)
    elif kind != "NO":
        raise UserError(f"{path} asks for distributed_type {kind}; set FSDP, DEEPSPEED or 'NO'.")
    return environment


def started_by_accelerate() -> bool:
    """Whether `accelerate launch` started this process, even if it is the only one."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ and READ_BY_US not in os.environ


def use_backend(recipe: Recipe) -> None:
    """Apply the recipe's accelerate configuration if `accelerate launch` has not.

    A single process needs no backend, unless the recipe names a configuration.
    """
    if not started_by_accelerate() and (find_world().size > 1 or recipe.launch.accelerate_config):
        os.environ.update(backend_environment(accelerate_config(recipe)) | {READ_BY_US: "true"})


def backend_variables(recipe: Recipe, processes: int) -> dict[str, str]:
    """The variables that so many processes of training will have for their backend."""
    if started_by_accelerate() or (processes == 1 and not recipe.launch.accelerate_config):
        return {}  # they are in the environment, or not needed
    return backend_environment(accelerate_config(recipe))


def processes_to_start(context: StageContext) -> int:
    """How many processes have to be started for a stage; 1 where it runs in this process."""
    if not context.stage.distributed or context.world.launcher != "alone":
        return 1
    return 1 if started_by_accelerate() else local_processes(context.run.recipe)


def start_processes(context: StageContext, processes: int) -> None:
    """`accelerate launch --config_file ... -m MODULE RECIPE`, and wait.

    Raises `UserError` with the failing rank, `Interrupted` if a signal stopped it.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    stage = context.stage
    assert stage.module is not None
    arguments = [
        "--config_file", str(accelerate_config(context.run.recipe)),
        "--num_processes", str(processes), "-m", stage.module, *context.run.words,
    ]  # fmt: skip
    say(f"accelerate launch {' '.join(arguments)}")
    # time for all ranks to save after a signal, before torchrun kills them
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    # the error below replaces torchrun's messages
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    settings = launch_command_parser().parse_args(arguments)
    # torchrun's own signals, and Slurm's warning
    settings.signals_to_handle = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    try:
        launch_command(settings)
    except SignalException as stop:
        # torchrun has passed the signal on, and the processes have saved and ended
        raise Interrupted(
            f"{stage.name} was stopped before its end; the same command continues it.",
            stop.sigval.name,
        ) from None
    except ChildFailedError as failure:
        rank, first = failure.get_first_failure()
        if first.exitcode == 2:
            raise UserError("") from None  # the process has printed the reason
        raise UserError(
            f"{stage.name}: rank {rank} ended with code {first.exitcode}; its output above has the "
            "reason; the same command continues from the last checkpoint."
        ) from None
