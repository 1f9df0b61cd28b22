"""Running stages: skip what is finished, continue what was cut short, start processes where a stage wants several."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from core.artifact import STAGE_FILE, StageRecord, read_record, stage_key, write_json, write_record
from core.errors import Interrupted, UserError
from core.progress import say
from core.world import find_world
from launcher.recipe import Recipe
from launcher.stages import COMMANDS, STAGES, Run, Stage
from launcher.start import local_processes, start_processes
from merge.plan import open_fitting
from tracking import Tracker, start_tracker

BEGUN_FILE = "begun.json"


def run_pipeline(recipe: Recipe, recipe_path: Path, overrides: list[str]) -> None:
    """All stages in order. What would stop a late stage is looked for before the first one."""
    check_before(recipe)
    for stage in STAGES:
        run_stage(Run(recipe), stage, recipe_path, overrides)


def check_before(recipe: Recipe) -> None:
    """Raises `UserError` for a pair that does not fit, text or prompts that are not there, too many processes."""
    run = Run(recipe)
    open_fitting({"base": run.base, "chat": run.chat})
    run.corpus_inputs()
    prompts = recipe.evaluation.prompts
    if prompts and not Path(prompts).is_file():
        raise UserError(f"evaluation.prompts = {prompts} does not exist; correct it or leave it out.")
    if recipe.launch.processes:
        local_processes(recipe)


def run_stage(run: Run, stage: Stage, recipe_path: Path, overrides: list[str]) -> None:
    """One stage: skipped if it is finished with the same configuration and inputs, else run, in one or more processes.

    Raises `Interrupted` if it was asked to stop before its end.
    """
    config = dict(stage.config(run.recipe))
    inputs = stage.inputs(run)
    key = stage_key(stage.name, config, inputs)
    record = read_record(run.folder(stage.name))
    if record and record.key == key:
        say(f"{stage.name}: finished already ({record.finished}); skipped")
        return
    processes = local_processes(run.recipe) if stage.distributed else 1
    if find_world().launcher == "alone" and processes > 1:
        start_processes(run.recipe, COMMANDS[stage.name], recipe_path, overrides, processes)
        record = read_record(run.folder(stage.name))
        if record is None or record.key != key:
            raise Interrupted(f"{stage.name} was stopped before its end; the same command continues it.")
        return
    try:
        execute(run, stage, key, config, inputs)
    except OSError as error:
        raise _disk_error(error, stage.name, run.folder(stage.name)) from error


def execute(run: Run, stage: Stage, key: str, config: dict[str, Any], inputs: dict[str, str]) -> None:
    """Run a stage in this process (and its siblings, which do the same) and mark it as finished."""
    folder, main = run.folder(stage.name), find_world().is_main
    if main:
        prepare_folder(folder, stage, key)
    say(f"── {stage.name} ──")
    started = time.time()
    tracker = open_tracker(run, stage.name, key, config, inputs)
    try:
        results = stage.run(run, key, tracker)
    except Interrupted:
        tracker.finish()
        raise
    except BaseException:
        tracker.finish(failed=True)
        raise
    if main:
        record = StageRecord(stage.name, key, config, inputs, results=results, tracking=tracker.record())
        record = write_record(folder, record, started)
        say(f"{stage.name}: finished in {record.seconds:.1f} s -> {folder}")
    tracker.finish()


def prepare_folder(folder: Path, stage: Stage, key: str) -> None:
    """Make the folder ready: keep what a cut-short stage left if it can continue, otherwise begin afresh.

    A resumable stage's folder holds days of work, so one made with other settings is moved aside, never removed.
    """
    begun = folder / BEGUN_FILE
    (folder / STAGE_FILE).unlink(missing_ok=True)
    if stage.resumable and begun.is_file():
        if key in begun.read_text():
            return
        aside = next(
            path for n in range(1, 10_000) if not (path := folder.with_name(f"{folder.name}.old-{n}")).exists()
        )
        os.replace(folder, aside)
        say(f"{stage.name}: settings or inputs changed; what there was is now {aside}")
    elif folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_json(begun, {"key": key})


def open_tracker(run: Run, stage: str, key: str, config: dict[str, Any], inputs: dict[str, str]) -> Tracker:
    """The stage's log: local under the stage's folder, and W&B as the recipe says."""
    recipe = run.recipe
    settings = {
        "recipe": recipe.model_dump(mode="json"), "stage_config": config, "inputs": inputs, "key": key,
        "origin": origin(),
    }  # fmt: skip
    group = group_name(recipe)
    run_id = f"{group}-{stage}-{key[:8]}"  # the same after every resume
    return start_tracker(
        recipe.tracking, stage, f"{recipe.name}-{stage}", group, run.folder(stage) / "log", settings, run_id
    )


def origin() -> dict[str, str]:
    """Where a result comes from: code, command, Slurm job."""
    here = Path(__file__).parent
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    slurm = {name.lower(): os.environ[name] for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST") if name in os.environ}
    return {"commit": found.stdout.strip() or "not in git", "command": shlex.join(sys.argv), **slurm}


def group_name(recipe: Recipe) -> str:
    """One W&B group per pipeline: the run's name and a digest of where it lies, so a requeued job finds it again."""
    return f"{recipe.name}-{stage_key('group', {'directory': str(recipe.directory.resolve())}, {})[:6]}"


def _disk_error(error: OSError, stage: str, folder: Path) -> Exception:
    if error.errno not in (28, 122):  # no space left, quota exceeded
        return error
    kept = [other.name for other in STAGES if read_record(folder.parent / other.name)]
    return UserError(
        f"{stage}: no space left while writing to {error.filename or folder}; free some and run the same command again "
        f"(finished and kept: {', '.join(kept) or 'nothing yet'})."
    )
