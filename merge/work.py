"""A merge in progress, in the directory beside its output: processes share it, and a killed one continues.

Everything here is a function of the plan's digest, so nobody has to agree with anybody:

    unfinished          the marker, and in it the digest: made last, when all files have their size and header
    written-*.jsonl     one for each process that ever took part; a line for each block that it wrote
    ranges-*.json       what one process found of whole tensors (`merge/ranges.py`)

A block's line follows its bytes. They may still lie in the system's memory then, so a line counts in two cases: a later
line says that so many blocks were synced to disk, or the machine has not been started anew since. Blocks that are
written twice get the same bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any

from checkpoint.reader import UNFINISHED_FILE
from checkpoint.writer import CheckpointFiles, Layout, beside, check_free, check_room, remove_unfinished
from core.artifact import write_json, write_text
from core.errors import UserError
from core.progress import say
from core.world import World
from merge.statistics import Sums

POLL = 0.05  # seconds between two looks at what the others have done
SYNC_BYTES = 512_000_000  # written between two syncs

BlockSums = list[Sums]  # one for each vector


class Work:
    """The directory of a merge. `digest` tells merges apart; `world` says which of several processes this is."""

    def __init__(self, out: Path, layout: Layout, digest: str, world: World) -> None:
        self.out, self.digest, self.world = out, digest, world
        self.files = CheckpointFiles(beside(out), layout)
        self.directory = self.files.directory
        self._lock: int | None = None
        self._journal: int | None = None
        self._noted = 0  # blocks in the journal
        self._unsynced = 0  # bytes written since the last sync began
        self._syncer = ThreadPoolExecutor(1)
        self._syncing: Future[None] | None = None

    def open(self) -> None:
        """Make the directory, or find it as an earlier attempt left it. Raises `UserError` if it is in use."""
        if self.world.is_main:
            self._open_as_main()
        else:
            self.wait(lambda: _read_marker(self.directory) == self.digest, "the first process to begin")
        name = f"written-{self.world.rank:05d}-{socket.gethostname()}-{os.getpid()}.jsonl"
        self._journal = os.open(self.directory / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._line({"boot": _boot()})

    def _open_as_main(self) -> None:
        check_free(self.out)
        if _read_marker(self.directory) == self.digest:
            self._hold()
            say(f"merge: continuing what was cut short in {self.directory}")
            return
        if self.directory.exists():
            self._hold()
            say(f"merge: {self.directory} was left by a merge of other inputs or settings; begun anew")
            remove_unfinished(self.directory)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        check_room(self.out.parent, self.files.layout)
        new = CheckpointFiles(self.directory.with_name(self.directory.name + ".new"), self.files.layout)
        shutil.rmtree(new.directory, ignore_errors=True)
        new.create()
        write_text(new.directory / UNFINISHED_FILE, self.digest)
        os.replace(new.directory, self.directory)
        self._hold()

    def _hold(self) -> None:
        """Keep other commands out until this process ends."""
        if not (self.directory / UNFINISHED_FILE).is_file():
            return
        self._lock = os.open(self.directory / UNFINISHED_FILE, os.O_RDWR)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{self.directory} is in use by another merge; wait for it, or choose another output."
            ) from None

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """Wait for other processes."""
        started, said = time.monotonic(), False
        while not done():
            time.sleep(POLL)
            if not said and time.monotonic() - started > 30:
                said = True
                say(f"merge: waiting for {what}")

    # --- blocks ---

    def note(self, block: int, sums: BlockSums, nbytes: int) -> None:
        """Block number `block` is written. Now and then everything is synced, while the work goes on."""
        self._line({"block": block, "sums": [astuple(of_vector) for of_vector in sums]})
        self._noted += 1
        self._unsynced += nbytes
        if self._unsynced >= SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            self.start_sync()

    def start_sync(self) -> None:
        """Make durable what this process has noted, in the background."""
        self._unsynced = 0
        self._syncing = self._syncer.submit(self._sync, self._noted)

    def finish_sync(self) -> None:
        """Wait until that is done. Raises what went wrong."""
        if self._syncing is not None:
            self._syncing.result()

    def _sync(self, noted: int) -> None:
        self.files.sync()
        self._line({"synced": noted})
        if self._journal is not None:
            os.fdatasync(self._journal)

    def finished_blocks(self) -> dict[int, BlockSums]:
        """What all processes have written, now and in earlier attempts."""
        found: dict[int, BlockSums] = {}
        for path in self.directory.glob("written-*.jsonl"):
            found.update(_trusted(path.read_bytes()))
        return found

    def _line(self, entry: dict[str, Any]) -> None:
        assert self._journal is not None
        os.write(self._journal, json.dumps(entry).encode() + b"\n")

    # --- what processes tell one another ---

    def tell(self, name: str, value: Any) -> None:
        """Leave a value for all processes."""
        write_json(self.directory / f"{name}-{self.world.rank:05d}-of-{self.world.size:05d}.json", value)

    def hear(self, name: str) -> list[Any]:
        """The values of all processes, when all are there."""
        paths = [self.directory / f"{name}-{rank:05d}-of-{self.world.size:05d}.json" for rank in range(self.world.size)]
        self.wait(lambda: all(path.is_file() for path in paths), f"all {self.world.size} processes")
        return [json.loads(path.read_text()) for path in paths]

    # --- the end ---

    def publish(self) -> None:
        """Remove what is only of use during the merge, and let the directory take its name."""
        self.finish_sync()
        self.close()
        for pattern in ("written-*.jsonl", "ranges-*.json"):
            for path in self.directory.glob(pattern):
                path.unlink()
        self.files.finish(self.out)

    def close(self) -> None:
        """Give up the files, and the lock. The work can be continued."""
        self._syncer.shutdown()
        self.files.release()
        for handle in (self._journal, self._lock):
            if handle is not None:
                os.close(handle)
        self._journal = self._lock = None

    def discard(self) -> None:
        """Remove everything: it is of no use."""
        self.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def _trusted(journal: bytes) -> Iterable[tuple[int, BlockSums]]:
    """The blocks that a journal vouches for. Its last line may be cut off."""
    lines = [json.loads(line) for line in journal.split(b"\n")[:-1]]
    blocks = [(line["block"], [Sums(*values) for values in line["sums"]]) for line in lines if "block" in line]
    if lines and lines[0].get("boot") == _boot():
        return blocks
    return blocks[: max((line["synced"] for line in lines if "synced" in line), default=0)]


def _boot() -> str:
    """Which start of which machine this is; unknown ones are never the same."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else f"unknown {os.getpid()}"


def _read_marker(directory: Path) -> str | None:
    try:
        return (directory / UNFINISHED_FILE).read_text()
    except OSError:
        return None
