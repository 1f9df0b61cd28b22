"""Upload later what a stage could not upload: no network, a server that did not answer, a kill."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from cpt_merge.core.config import parse_section
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import counted, say
from cpt_merge.tracking.config import TrackingConfig
from cpt_merge.tracking.events import Event, File, Image, Summary
from cpt_merge.tracking.sinks.local import RunIdentity, StageLog, read_log
from cpt_merge.tracking.sinks.wandb import WandbSink, check_reachable, continue_online
from cpt_merge.tracking.sinks.wandb_history import (
    held_rows,
    not_uploaded,
    of_other_runs,
    repair,
)
from cpt_merge.tracking.wandb_compat import is_offline


def upload(directory: Path) -> bool:
    """Upload what W&B lacks of a stage's log. Returns whether there was anything.

    No process may be logging. An online attempt that was cut short is continued: the server reports
    how many rows it has, and the others are sent from the local log. (`wandb sync --include-online`
    would append all its rows a second time.) Then `wandb sync` uploads the offline attempts, and
    rows that they lack (a full disk, a service that ended) follow from the local log.
    """
    log = read_log(directory)
    run = RunIdentity(**{field.name: log.run[field.name] for field in fields(RunIdentity)})

    def left() -> list[Path]:
        return [*of_other_runs(directory, run.run_id), *not_uploaded(directory, run.run_id)]

    for attempt in left():
        repair(attempt)
    attempts = left()  # a repair may remove an empty one
    if not attempts:
        return False
    config = parse_section(TrackingConfig, log.run["tracking"], str(directory / "run.json"))
    check_reachable(config)
    offline = [path for path in attempts if is_offline(path)]
    if len(offline) < len(attempts):
        say(f"W&B: {run.run_name}: the rest of its {len(log.rows):,} rows")
        _send(log, continue_online(config, run, directory.absolute()))
    if offline:
        say(f"W&B: {run.run_name}: {counted(len(offline), 'offline attempt')}")
        paths = [str(path.absolute()) for path in offline]
        # it prints its own errors
        subprocess.run([sys.executable, "-m", "wandb", "sync", *paths], cwd=directory, check=False)
    if still := left():
        raise UserError(f"W&B does not have all of {', '.join(map(str, still))}; try again.")
    held = held_rows(directory, run.run_id, None)
    missing = sum(bool(held.without(row)) for row in log.rows)
    if offline and missing:
        say(f"W&B: {run.run_name}: {missing:,} rows that its offline attempts lack")
        _send(log, continue_online(config, run, directory.absolute()))
    return True


def _send(log: StageLog, sink: WandbSink) -> None:
    """Send the missing rows, and everything else again, which replaces what W&B has."""
    sink.begin(math.inf)
    events: list[Event] = [
        *log.tables.values(),
        *(Image(name, path) for name, path in log.images.items()),
        *(File(name, path) for name, path in log.files.items()),
        *log.artifacts,
        Summary(log.summary),
    ]
    for event in events:
        sink.write(event)
    sink.finish(failed=bool(log.alerts) and log.alerts[-1]["title"].endswith(" failed"))
