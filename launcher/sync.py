"""`cpt-merge sync`: bring W&B what the stages of a run could not upload."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from cpt_merge.core.errors import UserError
from cpt_merge.core.lock import Lock
from cpt_merge.core.progress import say
from cpt_merge.launcher.run import LOCK_FILE
from cpt_merge.launcher.stages import STAGES
from cpt_merge.tracking import read_log


def sync(folder: Path) -> None:
    """Upload every log under `folder`: a run's, or one stage's.

    Raises `UserError` if none is there, one is in use, or none was to go to W&B.
    """
    found = [path.parent for path in folder.rglob("run.json")]
    logs = [
        path
        for path in found
        if path == folder or path.name == "log" or path.parent.name == "nodes"
    ]
    if not logs:
        raise UserError(
            f"{folder} holds no log of a stage; give a run's folder, such as runs/demo."
        )
    from cpt_merge.tracking.upload import upload

    with ExitStack() as stack:
        for run in sorted({_run_of(log) for log in logs}):
            # logs are mended before they are uploaded, which must not happen to one that is being written
            lock = Lock(run / LOCK_FILE, run, "upload when it has ended")
            lock.take()
            stack.callback(lock.release)
        uploaded = [log for log in sorted(logs, key=_place) if upload(log)]
    local = [log for log in sorted(logs, key=_place) if log not in uploaded and _only_local(log)]
    if len(local) == len(logs):
        raise UserError(
            f"{folder}: there is nothing to upload, since it was logged with tracking.mode: disabled, and W&B has "
            "nothing of it; set another mode before the next run."
        )
    if local:
        shown = ", ".join(_folder_of(log).name for log in local)
        say(
            f"W&B has nothing of {shown}: logged with tracking.mode: disabled, so there is nothing to upload"
        )
    others = " else" if local else ""
    rest = (
        f"{len(uploaded)} of {len(logs)} logs had something to upload"
        if uploaded
        else f"all{others} is uploaded"
    )
    say(f"W&B: {rest}")


def _only_local(log: Path) -> bool:
    """Whether no attempt of a log was to go to W&B: neither the last one, nor one before that left files for it."""
    return read_log(log).run.get("mode") == "disabled" and not any((log / "wandb").glob("*run-*"))


def _place(log: Path) -> tuple[Path, int, bool, Path]:
    """By run, and in it in the order of the stages; of a stage what was moved aside comes before what took its place.

    W&B takes the run that names a version first for its maker, so what a stage leaves must come before what uses it.
    """
    names, (stage, _, aside) = [stage.name for stage in STAGES], _folder_of(log).name.partition(".")
    return _run_of(log), names.index(stage) if stage in names else len(names), not aside, log


def _folder_of(log: Path) -> Path:
    """The stage's folder: RUN/STAGE of RUN/STAGE/log and of RUN/STAGE/log/nodes/NODE; else the log itself."""
    log = log.absolute()
    of_stage = log.parents[1] if log.parent.name == "nodes" else log
    return of_stage.parent if of_stage.name == "log" else of_stage


def _run_of(log: Path) -> Path:
    """The folder of the run that a log belongs to: RUN of RUN/STAGE/log and RUN/STAGE/log/nodes/NODE; else its own."""
    folder = _folder_of(log)
    return folder if folder == log.absolute() else folder.parent
