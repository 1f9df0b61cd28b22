"""Running stages: skip what is finished, continue what was cut short, start processes where a stage wants several."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.tokenizer_files import TokenizerFiles
from cpt_merge.core.artifact import (
    STAGE_FILE,
    StageRecord,
    installed_versions,
    read_record,
    write_json,
    write_record,
)
from cpt_merge.core.errors import Interrupted, UserError
from cpt_merge.core.lock import Lock
from cpt_merge.core.package import checkout
from cpt_merge.core.progress import say
from cpt_merge.core.world import find_world
from cpt_merge.data.mixture import mixture
from cpt_merge.launcher.identity import group_name, run_id
from cpt_merge.launcher.lineage import left, used
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.launcher.stages import COMMANDS, STAGES, Run, Stage, check_previewed, identify
from cpt_merge.launcher.start import (
    accelerate_config,
    local_processes,
    start_processes,
    started_by_accelerate,
)
from cpt_merge.merge.fit import open_fitting
from cpt_merge.tracking import Tracker, start_tracker
from cpt_merge.tracking.unsent import holds_unsent

BEGUN_FILE = "begun.json"
SLURM_VARIABLES = (
    "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES",
    "SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID",
)  # fmt: skip
LOCK_FILE = ".lock"  # in a run's folder, while a process works there
LOCK_VARIABLE = "CPT_MERGE_LOCK"  # set for the processes that a locked run starts
_held: list[Lock] = []  # until the process ends


def run_pipeline(recipe: Recipe, recipe_path: Path, overrides: list[str]) -> None:
    """All stages in order. What would stop a late stage is looked for before the first one."""
    check_before(recipe)
    for stage in STAGES:
        run_stage(Run(recipe), stage, recipe_path, overrides)


def check_before(recipe: Recipe) -> None:
    """Raises `UserError` for what `check_inputs` finds, and for processes that do not fit."""
    check_inputs(recipe)
    processes = local_processes(recipe) if recipe.launch.processes else 1
    recipe.training.check_processes(processes, " (launch.processes)")


def check_inputs(recipe: Recipe) -> None:
    """Raises `UserError` for a pair that does not fit, missing text, lists or prompts, a mixture that has no sense."""
    run = Run(recipe)
    open_fitting({"base": run.base, "chat": run.chat})
    run.corpus_inputs()
    run.further_models()
    for name, path in recipe.evaluation.files().items():
        if not Path(path).expanduser().exists():
            raise UserError(
                f"evaluation.{name} = {path} does not exist; correct it or leave it out."
            )
    if "knowledge" in recipe.evaluation.suites:
        recipe.evaluation.knowledge.check_installed()
    for language, path in recipe.tokenizer.pieces_from.items():
        if not Path(path).is_file():
            raise UserError(
                f"tokenizer.pieces_from.{language} = {path} does not exist; correct it or leave it out."
            )
    if recipe.training.preview.every is not None:
        tokenizer = TokenizerFiles.read(run.chat)
        check_previewed(run.chat, tokenizer.chat_template if tokenizer else None)
    accelerate_config(recipe)
    if all(
        source.epochs is None for source in recipe.corpus.sources
    ):  # else known when the text is tokenised
        mixture(recipe.corpus, [None] * len(recipe.corpus.sources), recipe.training.tokens)


def run_stage(run: Run, stage: Stage, recipe_path: Path, overrides: list[str]) -> None:
    """One stage: skipped if it is finished with the same configuration and inputs, else run, in one or more processes.

    Raises `Interrupted` if it was asked to stop before its end.
    """
    try:
        hold_lock(run)
    except OSError as error:
        raise _file_error(error, stage.name, run.recipe.directory) from error
    key, config, inputs = identify(run, stage)
    record = read_record(run.folder(stage.name))
    if record and record.key == key and stage.is_complete(stage.artifact(run)):
        say(f"{stage.name}: finished already ({record.finished}); skipped")
        return
    processes = local_processes(run.recipe) if stage.distributed else 1
    if find_world().launcher == "alone" and processes > 1 and not started_by_accelerate():
        start_processes(run.recipe, COMMANDS[stage.name], recipe_path, overrides, processes)
        record = read_record(run.folder(stage.name))
        if record is None or record.key != key:
            raise Interrupted(
                f"{stage.name} was stopped before its end; the same command continues it."
            )
        return
    try:
        execute(run, stage, key, config, inputs)
    except OSError as error:
        raise _file_error(error, stage.name, run.folder(stage.name)) from error


def execute(
    run: Run, stage: Stage, key: str, config: dict[str, Any], inputs: dict[str, str]
) -> None:
    """Run a stage in this process (and its siblings, which do the same) and mark it as finished."""
    folder, main = run.folder(stage.name), find_world().is_main
    say(f"── {stage.name} ──")
    started = time.time()
    with replacing(folder, stage, key) if main else nullcontext():
        tracker = open_tracker(run, stage.name, key, config, inputs)
        for artifact in used(run, stage.name, inputs):
            tracker.artifact(artifact)
        with closing_on_error(tracker, stage.name):
            results = stage.run(run, key, tracker)
    if main:
        record = StageRecord(
            stage.name, key, config, inputs, results=results, tracking=tracker.record()
        )
        record = write_record(folder, record, started)
        say(f"{stage.name}: finished in {record.seconds:.1f} s -> {folder}")
        for artifact in left(run, stage.name, key):
            tracker.artifact(artifact)
        tracker.alert(f"{stage.name} finished", f"{run.recipe.name}: in {record.seconds:,.0f} s")
    tracker.finish()


@contextmanager
def replacing(folder: Path, stage: Stage, key: str) -> Iterator[None]:
    """A folder for the stage's new result. What was there before comes back if the stage fails.

    A resumable stage's folder is kept while its key is the same, so that it continues. A precious one holds days of
    work: one that was made with other settings is moved aside for good, never removed.
    """
    before = folder.with_name(folder.name + ".before")
    if stage.resumable and _was_begun(folder, key):
        (folder / STAGE_FILE).unlink(missing_ok=True)
    elif stage.precious:
        _move_aside(folder, stage, key)
    elif (folder / STAGE_FILE).is_file():
        _remove(before, folder)
        os.replace(folder, before)
    elif _was_begun(folder, key):
        _remove_all_but_the_log(folder)
    elif folder.exists():
        _remove(folder, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / BEGUN_FILE, {"key": key})
        yield
    except Interrupted:
        raise  # it will be continued
    except BaseException:
        if (before / STAGE_FILE).is_file():
            _remove(folder, folder)
            os.replace(before, folder)
        raise
    _remove(before, folder)


def _remove(result: Path, folder: Path) -> None:
    """Remove a stage's result, but not what W&B has not got of its log: that is kept beside the stage's `folder`."""
    log = result / "log"
    if holds_unsent(log):
        places = (folder.with_name(f"{folder.name}.unsent-{number}") for number in range(1, 1000))
        aside = next(path for path in places if not path.exists())
        aside.mkdir()
        os.replace(log, aside / "log")
        say(
            f"{folder.name}: an earlier log that is not at W&B is now {aside / 'log'}; cpt-merge sync uploads it"
        )
    shutil.rmtree(result, ignore_errors=True)


def _remove_all_but_the_log(folder: Path) -> None:
    """Make room in a folder that an attempt left unfinished: this one starts over, in the same W&B run."""
    for path in folder.iterdir():
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        elif path.name != "log":
            shutil.rmtree(path)


def _was_begun(folder: Path, key: str) -> bool:
    begun = folder / BEGUN_FILE
    return begun.is_file() and key in begun.read_text()


def _move_aside(folder: Path, stage: Stage, key: str) -> None:
    """Keep what other settings made, and go on with what these made before, where it was moved aside."""
    names = [folder.with_name(f"{folder.name}.old-{number}") for number in range(1, 1000)]
    mine = next((path for path in names if _was_begun(path, key)), None)
    if folder.exists():
        aside = next(path for path in names if not path.exists())
        os.replace(folder, aside)
        say(f"{stage.name}: settings or inputs changed; what there was is now {aside}")
    if mine:
        os.replace(mine, folder)
        (folder / STAGE_FILE).unlink(missing_ok=True)
        say(f"{stage.name}: {mine} was made with these settings; it is taken back and goes on")


def open_tracker(
    run: Run, stage: str, key: str, config: dict[str, Any], inputs: dict[str, str]
) -> Tracker:
    """The stage's log: local under the stage's folder, and W&B as the recipe says."""
    recipe = run.recipe
    settings = {
        "recipe": recipe.model_dump(mode="json"), "stage_config": config, "inputs": inputs, "key": key,
        "origin": origin(), "versions": installed_versions(),
    }  # fmt: skip
    group = group_name(recipe.name, recipe.directory)
    log = run.folder(stage) / "log"
    wandb_id = run_id(recipe.directory, group, stage, key, log)
    return start_tracker(
        recipe.tracking, stage, f"{recipe.name}-{stage}", group, log, settings, wandb_id
    )


@contextmanager
def closing_on_error(tracker: Tracker, stage: str) -> Iterator[None]:
    """Close the log of what is stopped or fails within, with an alert that says so."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stop:
        _close(tracker, f"{stage} stopped", str(stop) or "stopped by Ctrl-C", failed=False)
        raise
    except BaseException as error:
        _close(tracker, f"{stage} failed", str(error) or type(error).__name__, failed=True)
        raise


def _close(tracker: Tracker, title: str, text: str, failed: bool) -> None:
    """Say that an exception is on its way up, which nothing must replace (the disk may be full)."""
    with suppress(OSError):
        tracker.alert(title, text)
    with suppress(OSError):
        tracker.finish(failed)


def origin() -> dict[str, Any]:
    """Where a result comes from: code, versions, command, machine, Slurm job."""
    slurm = {name.lower(): os.environ[name] for name in SLURM_VARIABLES if name in os.environ}
    return {**_code(), "command": shlex.join(sys.argv), "host": socket.gethostname(), **slurm}


def _code() -> dict[str, Any]:
    """The commit of this project and whether files differ from it; of an installed package neither is known."""
    folder = checkout()
    if not shutil.which("git") or not folder:
        return {"commit": "not known"}
    commit, changed = (
        subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=False
        ).stdout.strip()
        for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    )
    return {"commit": commit or "not known", "modified": bool(changed)}


def _file_error(error: OSError, stage: str, folder: Path) -> UserError:
    kept = [other.name for other in STAGES if read_record(folder.parent / other.name)]
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "no space left" if full else (error.strerror or str(error) or type(error).__name__)
    return UserError(
        f"{stage}: {reason}: {error.filename or folder}; mend that and run the same command again "
        f"(finished and kept: {', '.join(kept) or 'nothing yet'})."
    )


def hold_lock(run: Run) -> None:
    """Keep others out of the run's folder until this process ends. Raises `UserError` if another one is in it.

    The processes that this one starts are let in by the environment.
    """
    if LOCK_VARIABLE in os.environ or not find_world().is_main:
        return
    lock = Lock(
        run.recipe.directory / LOCK_FILE, run.recipe.directory, "give this run another name"
    )
    lock.take()
    _held.append(lock)
    os.environ[LOCK_VARIABLE] = str(lock.path)
