"""Starting a stage in several processes on this machine: `accelerate launch`, called from here."""

from __future__ import annotations

import logging
import os

from cpt_merge.core.errors import Interrupted, UserError
from cpt_merge.core.progress import counted, say
from cpt_merge.core.world import READ_BY_US, World, find_world, started_by_accelerate
from cpt_merge.launcher.accelerate_file import (
    USE_CPU,
    accelerate_config,
    apply_launched_file,
    backend_environment,
    check_accepted,
    machines,
)
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.launcher.stage import StageContext
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.settings import BackendSettings, backend_settings


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

    Raises `UserError` for a backend that cannot do what the recipe asks for, or a batch or a mesh
    that does not divide over them.
    """
    world = find_world()
    if recipe.launch.accelerate_config:
        backend_asked(recipe, recipe.launch.processes or 1)  # before torch is imported for GPUs
    processes = local_processes(recipe) if world.launcher == "alone" else world.size
    recipe.check_processes(processes, " of this machine (launch.processes)")
    if world.launcher == "alone":
        backend_asked(recipe, processes).mesh_shape(World(size=processes))
        if processes > 1:
            check_accepted(accelerate_config(recipe), processes)
    return processes


def check_one_machine(recipe: Recipe) -> None:
    """Raise `UserError` if a command that starts processes here is asked for other machines, too.

    Its processes would wait for those of the others for ever.
    """
    if find_world().launcher != "alone" or started_by_accelerate():
        return
    config = accelerate_config(recipe)
    if machines(config) > 1:
        raise UserError(
            f"{config} asks for num_machines: {machines(config)}, but this command starts "
            f"processes on this machine alone; run `accelerate launch --config_file {config} -m "
            "cpt_merge.training RECIPE` on each machine, or set num_machines: 1."
        )


def use_backend(recipe: Recipe) -> None:
    """Apply the recipe's accelerate configuration if `accelerate launch` has not.

    A single process needs no backend, unless the recipe names a configuration. Raises `UserError`
    for a configuration with unknown keys, whoever reads it.
    """
    if started_by_accelerate():
        apply_launched_file()
    elif find_world().size > 1 or recipe.launch.accelerate_config:
        os.environ.update(backend_environment(accelerate_config(recipe)) | {READ_BY_US: "true"})


def backend_variables(recipe: Recipe, processes: int) -> dict[str, str]:
    """The variables that so many processes of training will have for their backend."""
    if started_by_accelerate() or (processes == 1 and not recipe.launch.accelerate_config):
        return {}  # they are in the environment, or not needed
    return backend_environment(accelerate_config(recipe))


def backend_asked(
    recipe: Recipe, processes: int, config: TrainingConfig | None = None
) -> BackendSettings:
    """The backend that so many processes of training will have, with what the recipe adds to it.

    `config` is that of another training than the recipe's `training`.

    Raises `UserError` if the recipe contradicts the accelerate configuration.
    """
    variables = {**os.environ, **backend_variables(recipe, processes)}
    return backend_settings(variables).agreed(config or recipe.training)


def processes_to_start(context: StageContext) -> int:
    """How many processes have to be started for a stage; 1 where it runs in this process."""
    if not context.stage.distributed or context.world.launcher != "alone":
        return 1
    check_one_machine(context.run.recipe)
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
    config = accelerate_config(context.run.recipe)
    os.environ[USE_CPU] = backend_environment(config)[USE_CPU]  # accelerate may not pass it on
    arguments = [
        "--config_file", str(config),
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
