"""Uploading afterwards what a stage could not upload: no network, a server that did not answer, a kill."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from core.config import parse_section
from core.errors import UserError
from core.progress import say
from tracking.config import TrackingConfig
from tracking.local import RunIdentity, StageLog, read_log
from tracking.wandb_carrier import WandbCarrier, continue_online
from tracking.wandb_history import is_offline, mend, not_uploaded


def upload(directory: Path) -> bool:
    """Upload what W&B does not have of a stage's log. Returns whether there was anything. No process may be logging.

    An online attempt that was cut short is continued: the server says how many rows it has, and the others are sent
    from the local log. (`wandb sync --include-online` would append all its rows once more.) Then the offline
    attempts are given to `wandb sync`.
    """
    log = read_log(directory)
    run = RunIdentity(**{field.name: log.run[field.name] for field in fields(RunIdentity)})
    for attempt in not_uploaded(directory, run.run_id):
        mend(attempt)
    left = not_uploaded(directory, run.run_id)
    if any(not is_offline(path) for path in left):
        say(f"W&B: {run.run_name}: what is missing of its {len(log.rows):,} rows")
        config = parse_section(TrackingConfig, log.run["tracking"], str(directory / "run.json"))
        _send(log, continue_online(config, run, directory.absolute()))
    offline = [path for path in left if is_offline(path)]
    if offline:
        say(f"W&B: {run.run_name}: {len(offline)} offline attempt(s)")
        command = [sys.executable, "-m", "wandb", "sync", *(str(path.absolute()) for path in offline)]
        subprocess.run(command, cwd=directory, check=False)  # it says itself what it does
    still = not_uploaded(directory, run.run_id)
    if still:
        raise UserError(f"W&B has not got all of {', '.join(map(str, still))}; try again.")
    return bool(left)


def _send(log: StageLog, carrier: WandbCarrier) -> None:
    """Rows that are missing; the rest is replaced by itself."""
    carrier.begin(log.rows)
    for name, table in log.tables.items():
        carrier.table(name, table.columns, table.rows)
    for name, path in log.images.items():
        carrier.image(name, path)
    for name, path in log.files.items():
        carrier.file(name, path)
    for artifact in log.artifacts:
        carrier.artifact(artifact)
    carrier.summary(log.summary)
    carrier.finish(failed=False)
