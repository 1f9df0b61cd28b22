"""Which rows W&B has of a run, according to what every attempt left next to its local log.

Of an offline attempt, these are the rows in its transaction log (`run-ID.wandb`). A kill costs it
the last second; `wandb sync` uploads the rest once the log is repaired. Of an online attempt the
server got a first part, and it reports how much when the run is opened again (`starting_step`,
W&B's own count of rows). Which rows these are is recorded in our own journal: the server may have
rows that wandb had not yet written to its log when it was killed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from cpt_merge.tracking.events import STEP
from cpt_merge.tracking.wandb_compat import (
    attempt_folders,
    history_rows,
    is_offline,
    record_ends,
    synced_marker,
    transaction_log,
)

JOURNAL = "rows.jsonl"
RowKey = tuple[float | None, frozenset[str]]


def row_key(row: Mapping[str, float]) -> RowKey:
    """A row's step, and the names of its metrics."""
    return row.get(STEP), frozenset(row) - {"time", STEP}


def repair(attempt: Path) -> None:
    """Cut an incomplete record off the log of an attempt that has ended, for `wandb sync`.

    wandb writes by blocks, so that a kill may leave the first part of a record. `wandb sync` then
    reports it, skips all later attempts of the run, and exits with 0. It does the same for a log
    without a record; that attempt is removed.
    """
    log = transaction_log(attempt)
    data = log.read_bytes() if log.is_file() else b""
    ends = record_ends(data)
    if len(ends) < 2:  # the version, and the run
        shutil.rmtree(attempt)
    elif ends[-1] < len(data):
        os.truncate(log, ends[-1])


def not_uploaded(directory: Path, run_id: str) -> list[Path]:
    """Offline attempts that are not uploaded, and the last online one if it was cut short."""
    found = attempt_folders(directory, run_id)
    online = [path for path in found if not is_offline(path)][-1:]
    return [
        path
        for path in found
        if (is_offline(path) or path in online) and not synced_marker(path).exists()
    ]


def of_other_runs(directory: Path, run_id: str) -> list[Path]:
    """Offline attempts of other runs in a stage's log that `wandb sync` has not uploaded.

    A sweep, and an evaluation without a recipe, keep their folder for other settings, which are
    another run.
    """
    mine = attempt_folders(directory, run_id)
    return [
        path
        for path in attempt_folders(directory)
        if is_offline(path) and path not in mine and not synced_marker(path).exists()
    ]


class RowJournal:
    """The rows that an attempt has given to wandb, each written before it is given.

    In rows.jsonl, {"names": [...]} is a kind of row, and [row number by W&B's count, step, number
    of its kind] a row.
    """

    def __init__(self, attempt: Path) -> None:
        path = attempt / JOURNAL
        self._file = open(path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._kinds: dict[frozenset[str], int] = {}

    def write(self, number: int, key: RowKey) -> None:
        """Add the next row."""
        step, names = key
        if names not in self._kinds:
            self._kinds[names] = len(self._kinds)
            print(json.dumps({"names": sorted(names)}), file=self._file)
        print(json.dumps([number, step, self._kinds[names]]), file=self._file)


def _read_journal(attempt: Path) -> Iterator[tuple[int, RowKey]]:
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
    """The rows that W&B has: for each step, the names of its metrics.

    What is logged again is taken out.
    """

    def __init__(self, rows: Iterable[RowKey] = ()) -> None:
        self._rows: dict[float | None, list[frozenset[str]]] = {}
        self.add(rows)

    def add(self, rows: Iterable[RowKey]) -> None:
        """Add rows."""
        for step, names in rows:
            self._rows.setdefault(step, []).append(names)

    def without(self, row: Mapping[str, float]) -> dict[str, float]:
        """What is new in a row: without its time and the metrics that W&B has of its step.

        Empty if it has all.

        A repeated step need not have the same metrics: how long a checkpoint took is in the row
        after it.
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
        if not new:
            return {}
        return {name: value for name, value in row.items() if name in new or name == STEP}


def held_rows(directory: Path, run_id: str, starting_step: int | None) -> Held:
    """The rows that W&B has, or will have when the offline attempts are synced.

    `starting_step` is how many rows the server has of the online attempts, or None if it was not
    asked; then what an online attempt logged counts as held.
    """
    held = Held()
    online: dict[int, RowKey] = {}
    for attempt in attempt_folders(directory, run_id):
        if is_offline(attempt):
            held.add(key for _, key in read_rows(transaction_log(attempt)))
        elif rows := list(_read_journal(attempt)):
            # it began where the server's rows ended, so later rows before it never arrived
            first = rows[0][0]
            online = {step: key for step, key in online.items() if step < first} | dict(rows)
    held.add(key for step, key in online.items() if starting_step is None or step < starting_step)
    return held


def read_rows(log: Path) -> Iterator[tuple[int, RowKey]]:
    """(W&B's step, key) of every row of history in a transaction log, as far as it was written."""
    known: dict[frozenset[str], frozenset[str]] = {}  # few rows differ; equal names are kept once
    for number, values in history_rows(log):
        names = frozenset(name for name in values if name != STEP and not name.startswith("_"))
        step = float(values[STEP]) if STEP in values else None
        yield number, (step, known.setdefault(names, names))
