"""Under which ids the stages of a pipeline stand in W&B: the same after every resume, never those of another result.

RUN/wandb.json keeps them: {"digest": "3f9a01", "logs": {"demo-3f9a01-merge-0123abcd": 2}}. The digest is drawn when the
folder is first logged from, so that a folder that was removed and made anew is another group. A result that is made
once more with settings that were used before (merged at ratio 1, then 0.8, then 1) has a log of its own, and so a run
of its own: W&B would put its rows behind those of the first.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import write_json
from cpt_merge.core.errors import UserError
from cpt_merge.core.world import find_world
from cpt_merge.tracking.sinks.local import read_run

IDS_FILE = "wandb.json"


def group_name(name: str, directory: Path) -> str:
    """The group of the pipeline whose folder is `directory`."""
    return f"{name}-{_ids(directory)['digest']}"


def run_id(directory: Path, group: str, stage: str, key: str, log: Path) -> str:
    """The id of the run that a stage with this key logs to in `log`, which may hold earlier attempts."""
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
    """What the file says; rank 0 writes it where there is none (the others log nothing before it has)."""
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
            f"{path} is damaged; remove it (what is logged from then on is a new group in W&B)."
        ) from None
