"""Running one stage: skip it, start processes for it, or run it here and record its result."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial

from cpt_merge.core.artifact import StageRecord, installed_versions, read_record, write_record
from cpt_merge.core.errors import Interrupted, UserError
from cpt_merge.core.progress import say
from cpt_merge.launcher.freshness import check_current
from cpt_merge.launcher.growth import begin_longer, find_continued
from cpt_merge.launcher.identity import open_tracker, origin
from cpt_merge.launcher.lineage import left, used
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stage import Stage, StageContext, prepare
from cpt_merge.launcher.stage_folder import Begun, read_begun, stage_folder
from cpt_merge.launcher.start import processes_to_start, start_processes
from cpt_merge.tracking import Tracker


def run_stage(run: Run, stage: Stage) -> None:
    """Run one stage, in one or more processes; skip it if its result is available.

    Raises `Interrupted` if it was asked to stop, `UserError` for what the user can fix.
    """
    with _file_errors(run, stage), run.locked():
        context = prepare(run, stage)
        if context.world.is_main:
            check_current(run, stage)
            run.keep_digests()
        if not stage.accumulates and (record := context.finished()):
            say(f"{stage.name}: finished already ({record.finished}); skipped")
        elif (count := processes_to_start(context)) > 1:
            start_processes(context, count)
            record = read_record(context.folder)
            if record is None or record.key != context.key:
                raise Interrupted(
                    f"{stage.name} was stopped before its end; the same command continues it."
                )
        else:
            execute(context)


def execute(context: StageContext) -> None:
    """Run a stage in this process (all processes of its world do) and record its result."""
    stage, main = context.stage, context.world.is_main
    say(f"── {stage.name} ──")
    started = time.time()
    with _prepared_folder(context) if main else nullcontext():
        tracker = _open_tracker(context)
        for artifact in used(context):
            tracker.artifact(artifact)
        with closing_on_error(tracker, stage.name):
            results = stage.run(context, tracker)
    if main:
        record = StageRecord(
            stage.name, context.key, context.config, context.inputs,
            results=results, tracking=tracker.record(),
        )  # fmt: skip
        record = write_record(context.folder, record, started)
        say(f"{stage.name}: finished in {record.seconds:.1f} s -> {context.folder}")
        for artifact in left(context):
            tracker.artifact(artifact)
        name = context.run.recipe.name
        tracker.alert(f"{stage.name} finished", f"{name}: in {record.seconds:,.0f} s")
    tracker.finish()


@contextmanager
def _prepared_folder(context: StageContext) -> Iterator[None]:
    """The stage's folder, which may begin with what an earlier training of another length made."""
    continued = find_continued(context) if context.stage.grows else None
    if continued:
        say(f"{context.stage.name}: {continued}")
    begun = Begun(context.key, context.config, context.inputs)
    fill = partial(begin_longer, context, continued) if continued else None
    with stage_folder(context.folder, context.stage, begun, fill):
        yield


def _open_tracker(context: StageContext) -> Tracker:
    recipe, stage = context.run.recipe, context.stage
    settings = {
        "recipe": recipe.model_dump(mode="json"), "stage_config": context.config,
        "inputs": context.inputs, "key": context.key,
        "origin": origin(), "versions": installed_versions(),
    }  # fmt: skip
    begun = read_begun(context.folder) if context.world.is_main else None
    key = begun.tracked_key if begun else context.key
    return open_tracker(
        recipe.tracking, stage.name, recipe.name, recipe.directory, context.folder / "log",
        key, settings,
    )  # fmt: skip


@contextmanager
def closing_on_error(tracker: Tracker, stage: str) -> Iterator[None]:
    """Close the log of a stage that is stopped or fails within the block, with an alert."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stop:
        _close(tracker, f"{stage} stopped", str(stop) or "stopped by Ctrl-C", failed=False)
        raise
    except BaseException as error:
        _close(tracker, f"{stage} failed", str(error) or type(error).__name__, failed=True)
        raise


def _close(tracker: Tracker, title: str, text: str, failed: bool) -> None:
    """An exception is on its way up, and no other one must replace it (the disk may be full)."""
    with suppress(OSError):
        tracker.alert(title, text)
    with suppress(OSError):
        tracker.finish(failed)


@contextmanager
def _file_errors(run: Run, stage: Stage) -> Iterator[None]:
    """Turn an error of the file system into one sentence."""
    try:
        yield
    except OSError as error:
        # numpy says how much it wrote, and not why it wrote no more
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) or "requested and" in str(error)
        reason = "no space left" if full else (error.strerror or str(error) or type(error).__name__)
        folders = run.recipe.directory.glob("*/stage.json")
        records = filter(None, (read_record(path.parent) for path in folders))
        finished = [one.stage for one in sorted(records, key=lambda record: record.finished)]
        kept = ", ".join(dict.fromkeys(finished)) or "nothing yet"
        raise UserError(
            f"{stage.name}: {reason}: {error.filename or run.folder(stage.name)}; fix that and run "
            f"the same command again (finished and kept: {kept})."
        ) from error
