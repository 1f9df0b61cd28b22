"""`cpt-merge sync`: upload to W&B what the stages of a run could not upload."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from cpt_merge.core.errors import UserError
from cpt_merge.core.lock import Lock
from cpt_merge.core.progress import say
from cpt_merge.launcher.run import LOCK_FILE
from cpt_merge.launcher.stages import STAGE_NAMES
from cpt_merge.tracking import read_log


def sync(folder: Path) -> None:
    """Upload every log in `folder`, a run's or a stage's.

    Raises `UserError` if there is no log, if one is in use, or if all have only a local log.
    """
    found = [path.parent for path in folder.rglob("run.json")]
    logs = sorted(
        (one for one in found if one == folder or one.name == "log" or one.parent.name == "nodes"),
        key=_place,
    )
    if not logs:
        raise UserError(f"{folder} has no log of a stage; give a run's folder, such as runs/demo.")
    from cpt_merge.tracking.upload import upload

    with ExitStack() as stack:
        for run in sorted({_run_of(log) for log in logs}):
            # the upload repairs logs, which must not happen to one that is being written
            lock = Lock(run / LOCK_FILE, run, "upload when it has ended")
            lock.take()
            stack.callback(lock.release)
        uploaded = [log for log in logs if upload(log)]
    local = [  # neither the last attempt nor an earlier one was to go to W&B
        log
        for log in logs
        if log not in uploaded
        and read_log(log).run.get("mode") == "disabled"
        and not any((log / "wandb").glob("*run-*"))
    ]
    if len(local) == len(logs):
        raise UserError(
            f"{folder}: there is nothing to upload, because it was logged with tracking.mode: "
            "disabled; set another mode before the next run."
        )
    if local:
        shown = ", ".join(_folder_of(log).name for log in local)
        say(f"W&B: nothing to upload of {shown}: logged with tracking.mode: disabled")
    if uploaded:
        say(f"W&B: {len(uploaded)} of {len(logs)} logs had something to upload")
    else:
        say(f"W&B: {'everything else' if local else 'everything'} is uploaded")


def _place(log: Path) -> tuple[Path, int, bool, Path]:
    """By run and stage; a result that was moved aside comes before the one that replaced it.

    W&B takes the run that first names a version for its maker, so a result must be uploaded before
    the stages that use it.
    """
    names, (stage, _, aside) = STAGE_NAMES, _folder_of(log).name.partition(".")
    return _run_of(log), names.index(stage) if stage in names else len(names), not aside, log


def _folder_of(log: Path) -> Path:
    """The stage's folder RUN/STAGE of RUN/STAGE/log and RUN/STAGE/log/nodes/NODE; else the log."""
    log = log.absolute()
    of_stage = log.parents[1] if log.parent.name == "nodes" else log
    return of_stage.parent if of_stage.name == "log" else of_stage


def _run_of(log: Path) -> Path:
    """The folder of the run that a log belongs to; the log itself if it is in no stage's folder."""
    folder = _folder_of(log)
    return folder if folder == log.absolute() else folder.parent
