"""`cpt-merge sync`: bring W&B what the stages of a run could not upload."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from core.errors import UserError
from core.lock import Lock
from core.progress import say
from launcher.pipeline import LOCK_FILE


def sync(folder: Path) -> None:
    """Upload every log under `folder`: a run's, or one stage's. Raises `UserError` if none is there, or one in use."""
    found = sorted(path.parent for path in folder.rglob("run.json"))
    logs = [path for path in found if path == folder or path.name == "log" or path.parent.name == "nodes"]
    if not logs:
        raise UserError(f"{folder} holds no log of a stage; give a run's folder, such as runs/demo.")
    from tracking.upload import upload

    with ExitStack() as stack:
        for run in sorted({_run_of(log) for log in logs}):
            # logs are mended before they are uploaded, which must not happen to one that is being written
            lock = Lock(run / LOCK_FILE, run, "upload when it has ended")
            lock.take()
            stack.callback(lock.release)
        uploaded = [log for log in logs if upload(log)]
    say(f"W&B: {len(uploaded)} of {len(logs)} logs had something to upload" if uploaded else "W&B: all is uploaded")


def _run_of(log: Path) -> Path:
    """The folder of the run that a log belongs to: RUN of RUN/STAGE/log and RUN/STAGE/log/nodes/NODE; else its own."""
    log = log.absolute()
    of_stage = log.parents[1] if log.parent.name == "nodes" else log
    return of_stage.parents[1] if of_stage.name == "log" else of_stage
