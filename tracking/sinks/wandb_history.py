"""Which rows W&B has of a run, by what every attempt left beside its local log.

Offline, that is what stands in an attempt's transaction log (`run-ID.wandb`): a kill costs it the last second, and the
rest is uploaded by `wandb sync`, once the log is mended. Of an online attempt the server got a first part: how much, it
says when the run is opened again (`starting_step`, W&B's own count of rows). Which rows these are stands in a journal
of ours: the server may have rows that wandb had not yet written to its log when it was killed.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import HistoryRecord, Record

from cpt_merge.tracking.sinks.local import STEP, RowKey, row_key

HEADER = 7  # bytes before the first record
BLOCK = 1 << 15  # the log consists of blocks, and a record's fragment lies within one
FRAGMENT = struct.Struct("<IHB")  # checksum, length, kind
JOURNAL = "rows.jsonl"
WHOLE, LAST, FILLER = 1, 4, 0


def attempts(directory: Path, run_id: str) -> list[Path]:
    """The directories of a run's attempts under a stage's log, in the order of their starts."""
    found = (directory / "wandb").glob(f"*run-*-{run_id}")
    return sorted(
        (path for path in found if not path.is_symlink()),
        key=lambda path: path.name.removeprefix("offline-"),
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
    return [
        path for path in found if (is_offline(path) or path in online) and not marker(path).exists()
    ]


def of_other_runs(directory: Path, run_id: str) -> list[Path]:
    """Offline attempts of other runs under a stage's log that `wandb sync` has not uploaded.

    A sweep, and an evaluation without a recipe, keep their folder for other settings, which are another run.
    """
    mine = attempts(directory, run_id)
    found = sorted((directory / "wandb").glob("offline-run-*"))
    return [
        path
        for path in found
        if not path.is_symlink() and path not in mine and not marker(path).exists()
    ]


class Journal:
    """The rows that an attempt has given to wandb, each written before it is given.

    rows.jsonl: a list of names is a kind of row; [number of the row by W&B's count, step, number of its kind] is a row.
    """

    def __init__(self, attempt: Path) -> None:
        self._file = open(attempt / JOURNAL, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 - as long as the run
        self._kinds: dict[frozenset[str], int] = {}

    def write(self, number: int, key: RowKey) -> None:
        """The next row."""
        step, names = key
        if names not in self._kinds:
            self._kinds[names] = len(self._kinds)
            print(json.dumps({"names": sorted(names)}), file=self._file)
        print(json.dumps([number, step, self._kinds[names]]), file=self._file)


def read_journal(attempt: Path) -> Iterator[tuple[int, RowKey]]:
    """(W&B's step, key) of every row that an attempt gave to wandb."""
    path, kinds = attempt / JOURNAL, list[frozenset[str]]()
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for line in text.rpartition("\n")[0].splitlines():
        found = json.loads(line)
        if isinstance(found, dict):
            kinds.append(frozenset(found["names"]))
        else:
            number, step, kind = found
            yield number, (step, kinds[kind])


class Held:
    """Rows that W&B has, by their steps, and of each the names of its metrics. What is logged again is taken out."""

    def __init__(self, rows: Iterable[RowKey] = ()) -> None:
        self._rows: dict[float | None, list[frozenset[str]]] = {}
        self.add(rows)

    def add(self, rows: Iterable[RowKey]) -> None:
        """These too."""
        for step, names in rows:
            self._rows.setdefault(step, []).append(names)

    def without(self, row: Mapping[str, float]) -> dict[str, float]:
        """What is new in a row: without the metrics that W&B has of its step, which are taken out. Empty if it has all.

        A step that is done again need not have the same metrics: how long a checkpoint took is in the row after it.
        """
        step, names = row_key(row)
        held = self._rows.get(step, [])
        new = set(names)
        for place, found in enumerate(held):
            common = found & new
            new -= common
            held[place] = found - common
        if not any(held):
            self._rows.pop(step, None)
        return (
            {name: value for name, value in row.items() if name in new or name == STEP}
            if new
            else {}
        )


def held_rows(directory: Path, run_id: str, starting_step: int | None) -> Held:
    """The rows that W&B has, or will have when the offline attempts are synced.

    `starting_step`: how many rows the server has of the online attempts; None if it was not asked. Then what an online
    attempt logged counts as held.
    """
    held = Held()
    online: dict[int, RowKey] = {}
    for attempt in attempts(directory, run_id):
        if is_offline(attempt):
            held.add(key for _, key in read_rows(log_of(attempt)))
        elif rows := list(read_journal(attempt)):
            # it began where the server's rows ended, so later ones of the attempts before never got there
            first = rows[0][0]
            online = {step: key for step, key in online.items() if step < first} | dict(rows)
    held.add(key for step, key in online.items() if starting_step is None or step < starting_step)
    return held


def read_rows(log: Path) -> Iterator[tuple[int, RowKey]]:
    """(W&B's step, key) of every row of history in a transaction log, as far as it was written."""
    known: dict[
        frozenset[str], frozenset[str]
    ] = {}  # a run has few different rows; their names are kept once
    for record, _ in _records(log.read_bytes() if log.is_file() else b""):
        found = Record.FromString(record)
        if found.WhichOneof("record_type") == "history":
            step, names = _key(found.history)
            yield found.history.step.num, (step, known.setdefault(names, names))


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
    # of a table or figure, several values of one name, the name alone
    values = {item.key or item.nested_key[0]: item.value_json for item in row.item}
    names = frozenset(name for name in values if name != STEP and not name.startswith("_"))
    return (float(values[STEP]) if STEP in values else None), names
