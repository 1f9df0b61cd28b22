"""What this project uses of wandb that is not its public API. Tested with wandb 0.31.

When wandb is updated, check this module: the service process, artifacts by reference without a
server, the lookup of API keys, and the files of an attempt (names, transaction log, the marker of
`wandb sync`).
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

# read at import; otherwise wandb's own telemetry prints its retries when a start fails
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

import wandb as wandb  # for the others, so that the variable is set before the import
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.lib.wbauth import read_netrc_auth

from cpt_merge.tracking.events import Artifact

# --- API keys


def find_key() -> bool:
    """Whether the environment, a netrc file or wandb's settings have a key for the server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = wandb.setup().settings
    return bool(settings.api_key or read_netrc_auth(host=settings.base_url))


# --- the service process, to which wandb hands everything


def kill_service() -> None:
    """Kill the service: at exit, wandb would wait for its uploads for as long as they take."""
    with suppress(Exception):
        _service_process().kill()
    forget_service()


def forget_service() -> None:
    """Let wandb start another service.

    Its teardown tells the old one to end, and exits if that is gone.
    """
    with suppress(Exception, SystemExit):
        wandb.teardown()


def service_has_ended() -> bool:
    """Whether the service is dead. A dead one accepts the next row and loses it."""
    process = _service_process()
    return process is not None and process.poll() is not None


def service_ends_soon() -> bool:
    """Whether the service ends within a second: a call may fail before the end is visible."""
    for _ in range(10):
        if service_has_ended():
            return True
        time.sleep(0.1)
    return False


def _service_process() -> Any:
    """The process of wandb's service, None if another process has started it."""
    started = wandb.setup().ensure_service()._proc
    return started and started._process


# --- artifacts


def log_artifact(run: Any, artifact: Artifact) -> None:
    """Log a reference to a directory or file by this project's digest, without reading it."""
    made = wandb.Artifact(artifact.name, type=artifact.kind, metadata=asdict(artifact))
    # the entry's name contains the digest, so that other content is another version
    made.add_reference(artifact.uri, name=artifact.digest.replace(":", "-"), checksum=False)
    # `use_artifact` needs a server; this is what it does with a new artifact, and works offline too
    run._log_artifact(made, use_after_commit=artifact.used)


# --- the files of an attempt

_HEADER = 7  # bytes before the first record of a transaction log
_BLOCK = 1 << 15  # the log consists of blocks, and no fragment of a record crosses their borders
_FRAGMENT = struct.Struct("<IHB")  # checksum, length, kind
_WHOLE, _LAST, _FILLER = 1, 4, 0


def attempt_folders(directory: Path, run_id: str = "*") -> list[Path]:
    """The folders of the attempts of a run (by default of all), in the order of their starts."""
    found = (directory / "wandb").glob(f"*run-*-{run_id}")
    return sorted(
        (path for path in found if not path.is_symlink()),
        key=lambda path: path.name.removeprefix("offline-"),
    )


def is_offline(attempt: Path) -> bool:
    """Whether the attempt was offline."""
    return attempt.name.startswith("offline-")


def transaction_log(attempt: Path) -> Path:
    """An attempt's transaction log: `run-ID.wandb` in `offline-run-DATE_TIME-ID`."""
    return attempt / f"run-{attempt.name.removeprefix('offline-').split('-', 2)[2]}.wandb"


def synced_marker(attempt: Path) -> Path:
    """The file by which `wandb sync` knows that the server has all of an attempt."""
    return transaction_log(attempt).with_suffix(".wandb.synced")


def record_ends(data: bytes) -> list[int]:
    """Where each whole record of a transaction log ends."""
    return [end for _, end in _records(data)]


def history_rows(log: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(W&B's own step, JSON values by name) of every row of history that a transaction log has."""
    for data, _ in _records(log.read_bytes() if log.is_file() else b""):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            # of a table or picture, which has several values under one name, the name alone
            items = record.history.item
            values = {item.key or item.nested_key[0]: item.value_json for item in items}
            yield record.history.step.num, values


def _records(data: bytes) -> Iterator[tuple[bytes, int]]:
    """The records of a log, and where each ends, without one that a kill cut short."""
    place, parts = _HEADER, b""
    while place + _FRAGMENT.size <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _FRAGMENT.size:  # the rest of a block has no room for a fragment
            place += left
            continue
        _, length, kind = _FRAGMENT.unpack_from(data, place)
        start = place + _FRAGMENT.size
        place = start + length
        if kind == _FILLER or place > len(data):
            return
        parts += data[start:place]
        if kind in (_WHOLE, _LAST):
            yield parts, place
            parts = b""
