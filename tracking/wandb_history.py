"""Which rows W&B has of a run, by the transaction logs (`run-ID.wandb`) that every attempt left beside its local log.

A killed attempt's log lacks its last second. What it holds is uploaded by `wandb sync` if the attempt was offline, once
it is mended. Of an online attempt the server got a first part: how much, it says when the run is opened again
(`starting_step`, W&B's own count of rows, which also stands beside each row in the log).
"""

from __future__ import annotations

import os
import shutil
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import HistoryRecord, Record

from tracking.local import STEP, RowKey

HEADER = 7  # bytes before the first record
BLOCK = 1 << 15  # the log consists of blocks, and a record's fragment lies within one
FRAGMENT = struct.Struct("<IHB")  # checksum, length, kind
WHOLE, LAST, FILLER = 1, 4, 0


def attempts(directory: Path, run_id: str) -> list[Path]:
    """The directories of a run's attempts under a stage's log, in the order of their starts."""
    found = (directory / "wandb").glob(f"*run-*-{run_id}")
    return sorted(
        (path for path in found if not path.is_symlink()), key=lambda path: path.name.removeprefix("offline-")
    )


def is_offline(attempt: Path) -> bool:
    """Whether the attempt was offline."""
    return attempt.name.startswith("offline-")


def log_of(attempt: Path) -> Path:
    """An attempt's transaction log: `run-ID.wandb` in `offline-run-DATE_TIME-ID`."""
    return attempt / f"run-{attempt.name.removeprefix('offline-').split('-', 2)[2]}.wandb"


def marker(attempt: Path) -> Path:
    """The file by which `wandb sync` knows that all of an attempt is at the server."""
    return log_of(attempt).with_suffix(".wandb.synced")


def mend(attempt: Path) -> None:
    """Make the log of an attempt that has ended one that `wandb sync` takes: cut off a record that is not whole.

    wandb writes by blocks, so that a kill may leave the first part of a record; `wandb sync` then says so, leaves out
    all later attempts of the run, and ends with code 0. So it does for a log without a record; that attempt is removed.
    """
    log = log_of(attempt)
    data = log.read_bytes() if log.is_file() else b""
    ends = [end for _, end in _records(data)]
    if len(ends) < 2:  # the version, and the run
        shutil.rmtree(attempt)
    elif ends[-1] < len(data):
        os.truncate(log, ends[-1])


def not_uploaded(directory: Path, run_id: str) -> list[Path]:
    """Offline attempts that `wandb sync` has not uploaded, and the last online one if its end was not."""
    found = attempts(directory, run_id)
    online = [path for path in found if not is_offline(path)][-1:]
    return [path for path in found if (is_offline(path) or path in online) and not marker(path).exists()]


def held_rows(directory: Path, run_id: str, starting_step: int | None) -> Counter[RowKey]:
    """The rows that W&B has, or will have when the offline attempts are synced.

    `starting_step`: how many rows the server has of the online attempts; None if it was not asked. Then what an online
    attempt logged counts as held.
    """
    held: Counter[RowKey] = Counter()
    online: dict[int, RowKey] = {}
    for attempt in attempts(directory, run_id):
        rows = list(read_rows(log_of(attempt)))
        if is_offline(attempt):
            held.update(key for _, key in rows)
        elif rows:
            # it began where the server's rows ended, so later ones of the attempts before never got there
            first = rows[0][0]
            online = {step: key for step, key in online.items() if step < first} | dict(rows)
    held.update(key for step, key in online.items() if starting_step is None or step < starting_step)
    return held


def read_rows(log: Path) -> Iterator[tuple[int, RowKey]]:
    """(W&B's step, key) of every row of history in a transaction log, as far as it was written."""
    for record, _ in _records(log.read_bytes() if log.is_file() else b""):
        found = Record.FromString(record)
        if found.WhichOneof("record_type") == "history":
            yield found.history.step.num, _key(found.history)


def _records(data: bytes) -> Iterator[tuple[bytes, int]]:
    """The records of a log, and where each ends; one that was cut off by a kill is left out."""
    place, parts = HEADER, b""
    while place + FRAGMENT.size <= len(data):
        left = BLOCK - place % BLOCK
        if left < FRAGMENT.size:  # the rest of a block that has no room for a fragment
            place += left
            continue
        _, length, kind = FRAGMENT.unpack_from(data, place)
        start = place + FRAGMENT.size
        place = start + length
        if kind == FILLER or place > len(data):
            return
        parts += data[start:place]
        if kind in (WHOLE, LAST):
            yield parts, place
            parts = b""


def _key(row: HistoryRecord) -> RowKey:
    values = {item.key or ".".join(item.nested_key): item.value_json for item in row.item}
    names = frozenset(name for name in values if not name.startswith("_"))
    return (float(values[STEP]) if STEP in values else None), names
