"""`cpt-merge sync`: bring W&B what the stages of a run could not upload."""

from __future__ import annotations

from pathlib import Path

from core.errors import UserError
from core.progress import say


def sync(folder: Path) -> None:
    """Upload every log under `folder`: a run's, or one stage's. Raises `UserError` if there is none."""
    found = sorted(path.parent for path in folder.rglob("run.json"))
    logs = [path for path in found if path == folder or path.name == "log" or path.parent.name == "nodes"]
    if not logs:
        raise UserError(f"{folder} holds no log of a stage; give a run's folder, such as runs/demo.")
    from tracking.upload import upload

    uploaded = [log for log in logs if upload(log)]
    say(f"W&B: {len(uploaded)} of {len(logs)} logs had something to upload" if uploaded else "W&B: all is uploaded")
