"""Which blocks of a merge are written: one file for each process that ever took part, a line for each block.

A block's line follows its bytes. They may still lie in the system's memory then, so a line counts in two cases: a later
line says that so many blocks were synced to disk, or the machine has not been started anew since.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any

from cpt_merge.merge.norms import Sums

SYNC_BYTES = 512_000_000  # written between two syncs

BlockSums = list[Sums]  # one for each vector


class Journal:
    """One process's. `sync` makes durable what the process has written."""

    def __init__(self, directory: Path, rank: int, sync: Callable[[], None]) -> None:
        self.path = directory / f"written-{rank:05d}-{secrets.token_hex(8)}.jsonl"
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        self._sync_files = sync
        self._noted = 0  # blocks
        self._unsynced = 0  # bytes written since the last sync began
        self._syncer = ThreadPoolExecutor(1)
        self._syncing: Future[None] | None = None
        self._line({"boot": boot()})

    def note(self, block: int, sums: BlockSums, nbytes: int) -> None:
        """Block number `block` is written. Now and then everything is synced, while the work goes on."""
        self._line({"block": block, "sums": [astuple(of_vector) for of_vector in sums]})
        self._noted += 1
        self._unsynced += nbytes
        if self._unsynced >= SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            self.start_sync()

    def start_sync(self) -> None:
        """Make durable what this process has noted, in the background. Raises what went wrong the last time."""
        self.finish_sync()
        self._unsynced = 0
        self._syncing = self._syncer.submit(self._sync, self._noted)

    def finish_sync(self) -> None:
        """Wait until that is done. Raises what went wrong: the system reports a failed write only once."""
        if self._syncing is not None:
            self._syncing.result()

    def close(self) -> None:
        """The file."""
        self._syncer.shutdown()
        os.close(self._handle)

    def _sync(self, noted: int) -> None:
        self._sync_files()
        self._line({"synced": noted})
        os.fsync(self._handle)

    def _line(self, entry: dict[str, Any]) -> None:
        os.write(self._handle, json.dumps(entry).encode() + b"\n")


def read_blocks(directory: Path) -> dict[int, BlockSums]:
    """The blocks that all journals vouch for."""
    found: dict[int, BlockSums] = {}
    for path in directory.glob("written-*.jsonl"):
        found.update(trusted(path.read_bytes()))
    return found


def vouch(directory: Path, sync: Callable[[], None]) -> None:
    """Make durable what earlier processes of this machine noted, and say so for those of other machines."""
    pending = {
        path: len(blocks)
        for path in directory.glob("written-*.jsonl")
        if (lines := _lines(path.read_bytes())) and lines[0].get("boot") == boot()
        if len(blocks := _blocks(lines)) > _synced(lines)
    }
    if not pending:
        return
    sync()
    for path, count in pending.items():
        with open(path, "ab") as file:
            file.write(b"\n" + json.dumps({"synced": count}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def trusted(journal: bytes) -> list[tuple[int, BlockSums]]:
    """The blocks that one journal vouches for."""
    lines = _lines(journal)
    blocks = _blocks(lines)
    same_boot = bool(lines) and lines[0].get("boot") == boot()
    return blocks if same_boot else blocks[: _synced(lines)]


def _lines(journal: bytes) -> list[dict[str, Any]]:
    """The whole lines; one that was cut off is left out."""
    found = []
    for line in journal.split(b"\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def _blocks(lines: list[dict[str, Any]]) -> list[tuple[int, BlockSums]]:
    return [
        (line["block"], [Sums(*values) for values in line["sums"]])
        for line in lines
        if "block" in line
    ]


def _synced(lines: list[dict[str, Any]]) -> int:
    return max((line["synced"] for line in lines if "synced" in line), default=0)


def boot() -> str:
    """Which start of which machine this is; unknown ones are never the same."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else f"unknown {secrets.token_hex(8)}"
