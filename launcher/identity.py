"""The ids of a run's stages at W&B: the same after every resume, new for each new result.

RUN/wandb.json keeps them: {"digest": "3f9a01", "logs": {"demo-3f9a01-merge-0123abcd": 2}}. The
digest is drawn when something is first logged from the folder, so a folder that was removed and
made again is another group. A result that is made again with settings that were used before (merged
at ratio 1, then 0.8, then 1) has its own log and its own W&B run, because W&B would append its rows
to those of the first.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import write_json
from cpt_merge.core.errors import UserError
from cpt_merge.core.package import checkout
from cpt_merge.core.world import find_world
from cpt_merge.tracking import Tracker, TrackingConfig, start_tracker
from cpt_merge.tracking.sinks.local import read_run

IDS_FILE = "wandb.json"
SLURM_VARIABLES = (
    "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES", "SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID",
)  # fmt: skip


def open_tracker(
    config: TrackingConfig, stage: str, name: str, directory: Path, log: Path, key: str,
    settings: dict[str, Any],
) -> Tracker:  # fmt: skip
    """The tracker of a stage of the run `name`; `directory` holds the ids, `log` is written to."""
    group = group_name(name, directory)
    wandb_id = run_id(directory, group, stage, key, log)
    return start_tracker(config, stage, f"{name}-{stage}", group, log, settings, wandb_id)


def group_name(name: str, directory: Path) -> str:
    """The group of the run whose folder is `directory`."""
    return f"{name}-{_ids(directory)['digest']}"


def run_id(directory: Path, group: str, stage: str, key: str, log: Path) -> str:
    """The id of the W&B run of a stage with this key; `log` may hold earlier attempts of it."""
    first = f"{group}-{stage}-{key[:8]}"
    if not find_world().is_main:
        return first  # it logs nothing; a node's run takes its name from what rank 0 wrote
    held, ids = read_run(log).get("run_id"), _ids(directory)
    if held in _numbered(first, ids["logs"].get(first, 0)):
        return str(held)
    ids["logs"][first] = ids["logs"].get(first, 0) + 1
    write_json(directory / IDS_FILE, ids)
    return _numbered(first, ids["logs"][first])[-1]


def _numbered(first: str, logs: int) -> list[str]:
    return [first if number == 1 else f"{first}-{number}" for number in range(1, logs + 1)]


def _ids(directory: Path) -> dict[str, Any]:
    """The content of the file. Rank 0 writes it if it is missing; other ranks do not log before."""
    path = directory / IDS_FILE
    if not path.is_file():
        ids: dict[str, Any] = {"digest": secrets.token_hex(3), "logs": {}}
        if find_world().is_main:
            directory.mkdir(parents=True, exist_ok=True)
            write_json(path, ids)
        return ids
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {"digest": str(found["digest"]), "logs": dict(found["logs"])}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is damaged; remove it (later logs then form a new group in W&B)."
        ) from None


def origin() -> dict[str, Any]:
    """Where a result comes from: code, command, machine, Slurm job."""
    slurm = {name.lower(): os.environ[name] for name in SLURM_VARIABLES if name in os.environ}
    command = shlex.join(sys.argv)
    return {**_code(), "command": command, "host": socket.gethostname(), **slurm}


def _code() -> dict[str, Any]:
    """The commit of this project and whether files differ from it; unknown for a wheel."""
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
