"""Read what wandb wrote without the code under test: by `leet inspect` or protobuf records."""

import json
import os
import subprocess
import sys
from pathlib import Path

import wandb
from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEAD = 32768, 7


def records(log: Path) -> list[Record]:
    """Every whole record of a transaction log (LevelDB's framing after seven bytes of header)."""
    data, place, found, parts = log.read_bytes(), HEAD, [], b""
    while place + HEAD <= len(data):
        if BLOCK - place % BLOCK < HEAD:
            place += BLOCK - place % BLOCK
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        place += HEAD + length
        if place > len(data):
            break
        parts += data[place - length : place]
        if kind in (1, 4):
            found.append(Record.FromString(parts))
            parts = b""
    return found


def attempts(directory: Path) -> list[Path]:
    """The transaction logs of all attempts in a tracker's directory, oldest first."""
    wandb.teardown()  # this process's service closes its logs a moment after a run's finish
    logs = [
        path
        for path in (directory / "wandb").glob("*run-*/*.wandb")
        if not path.parent.is_symlink()
    ]
    return sorted(logs, key=lambda path: path.parent.name.removeprefix("offline-"))


def items(log: Path) -> list[dict]:
    """The rows of history of one attempt."""
    return [
        {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for record in records(log)
        if record.WhichOneof("record_type") == "history"
    ]


def history(directory: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric in all attempts."""
    found = [item for log in attempts(directory) for item in items(log)]
    return [(item["train/step"], item[metric]) for item in found if metric in item]


def inspect(run: Path) -> list[dict]:
    """The records of one attempt, as `wandb leet inspect` shows them."""
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(run)]
    shown = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "LANG": "C.UTF-8"}
    )
    return [json.loads(line) for line in shown.stdout.splitlines() if line.startswith("{")]
