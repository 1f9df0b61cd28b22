"""A file merge in progress: processes share its directory, and a killed merge continues from it.

Everything here is a function of the plan's digest, so the processes need no agreement. The
directory `OUT.tmp` holds, next to the files of the output:

    unfinished           the marker with the digest (`core.artifact.Staging`): written when all
                         files have their size and header, removed last
    written-*.jsonl      what is written; blocks that are written twice get the same bytes
    ranges-*.json        what one process found out about whole tensors
    failed-*, stopped-*  why a process stopped, so that the others stop too; after `failed` the work
                         is of no use

Only the first process makes the directory and renames it; meanwhile it holds a lock.

A journal has one line for each block, written after the block's bytes. The bytes may still be in
the system's memory then, so a line counts in two cases: a later line says that so many blocks were
synced to disk, or the machine has not been restarted since.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.writer import SCRATCH, CheckpointFiles, CheckpointLayout
from cpt_merge.core.artifact import Staging, write_json
from cpt_merge.core.distributed import collect, publish, wait_for
from cpt_merge.core.errors import Interrupted, UserError
from cpt_merge.core.lock import Lock
from cpt_merge.core.progress import say
from cpt_merge.core.world import World
from cpt_merge.merge.norms import Sums

SYNC_BYTES = 512_000_000  # written between two syncs

BlockSums = list[Sums]  # one for each vector


class Work:
    """The directory of a merge, which `digest` identifies, as one process of `world` sees it."""

    def __init__(self, out: Path, layout: CheckpointLayout, digest: str, world: World) -> None:
        self.out, self.digest, self.world = out, digest, world
        self.staging = staging(out, digest)
        self.directory = self.staging.directory
        self.files = CheckpointFiles(self.directory, layout)
        lock_file = out.with_name(out.name + ".lock")
        self._lock = Lock(lock_file, self.directory, "choose another output")
        self._failure = out.with_name(out.name + ".failed")  # for processes that start too late
        self._journal: Journal | None = None
        self._started = time.time()
        self.opened = False

    def open(self) -> None:
        """Make the directory, or continue an earlier attempt's.

        Raises `UserError` if it is in use.
        """
        if self.world.is_main:
            self._lock.take()
            self._failure.unlink(missing_ok=True)
            for reason in [*self.directory.glob("failed-*"), *self.directory.glob("stopped-*")]:
                reason.unlink()
            if self.staging.begin(self.files.create):
                say(f"merge: continuing the unfinished merge in {self.directory}")
                self.files.lay_out()  # a crash of the machine may have lost sizes and headers
        else:
            self.wait_for(lambda: self.staging.is_begun, "the first process to begin")
        self.opened = True
        sync_earlier_blocks(self.directory, self._sync_all)
        self._journal = Journal(self.directory, self.world.rank, self.files.sync)

    def _sync_all(self) -> None:
        """Make durable what all processes of this machine wrote."""
        for file in self.files.layout.headers:
            handle = os.open(self.directory / file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)

    @property
    def journal(self) -> Journal:
        """What this process has written; available while the work is open."""
        assert self._journal is not None, "the work is not open"
        return self._journal

    def finished_blocks(self) -> dict[int, BlockSums]:
        """What all processes have written, now and in earlier attempts."""
        return read_blocks(self.directory)

    # --- what processes tell one another ---

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for other processes. Raises the error of a process that has failed."""
        wait_for(condition, what, check=self._raise_failure)

    def share(self, name: str, value: Any) -> list[Any]:
        """Give a value to all processes and get the values of all of them, by rank."""
        publish(self.directory, name, self.world, value)
        return collect(self.directory, name, self.world, self._raise_failure)

    def abandon(self, reason: str, useless: bool = False) -> None:
        """Tell the other processes why, and release everything; `useless` work is removed."""
        if self.opened and self.world.size > 1:
            kind = "failed" if useless else "stopped"
            with suppress(FileNotFoundError):  # the first process has removed everything already
                (self.directory / f"{kind}-{self.world.rank:05d}").write_text(reason)
        if self._lock.held and useless and self.world.size > 1:
            write_json(self._failure, {"digest": self.digest, "reason": reason})
        self.close()
        if self.opened and useless and self.world.is_main:
            for _ in range(20):  # other processes may still be writing into it for a moment
                shutil.rmtree(self.directory, ignore_errors=True)
                if not self.directory.exists():
                    return
                time.sleep(0.05)

    def _raise_failure(self) -> None:
        for kind, error in (("failed", UserError), ("stopped", Interrupted)):
            for path in self.directory.glob(f"{kind}-*"):
                if path.stat().st_mtime >= self._started - 1:  # not one of an earlier attempt
                    raise error(path.read_text())
        if not self.opened and self._failure.is_file():
            failure = json.loads(self._failure.read_text())
            if failure.get("digest") == self.digest:
                raise UserError(failure["reason"])
        if self.opened and not self.directory.exists() and not self.out.exists():
            raise UserError("the first process of this merge has failed; its own message says why.")

    # --- the end ---

    def publish(self) -> None:
        """Give the directory its name."""
        self.journal.finish_sync()
        self.files.release()
        self.files.write_index()
        self.staging.commit()
        self.close()

    def close(self) -> None:
        """Release the files and the lock."""
        self.files.release()
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._lock.release()


def staging(out: Path, digest: str) -> Staging:
    """The directory in which a merge is made."""
    return Staging(out, digest, scratch=SCRATCH)


class Journal:
    """The journal of one process. `sync` makes durable what the process has written."""

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
        """Block number `block` is written. Now and then everything is synced in the background."""
        self._line({"block": block, "sums": [astuple(of_vector) for of_vector in sums]})
        self._noted += 1
        self._unsynced += nbytes
        if self._unsynced >= SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            self.start_sync()

    def start_sync(self) -> None:
        """Sync in the background what this process has noted. Raises the error of the last sync."""
        self.finish_sync()
        self._unsynced = 0
        self._syncing = self._syncer.submit(self._sync, self._noted)

    def finish_sync(self) -> None:
        """Wait for the sync. Raises its error: the system reports a failed write only once."""
        if self._syncing is not None:
            self._syncing.result()

    def close(self) -> None:
        """Close the file."""
        self._syncer.shutdown()
        os.close(self._handle)

    def _sync(self, noted: int) -> None:
        self._sync_files()
        self._line({"synced": noted})
        os.fsync(self._handle)

    def _line(self, entry: dict[str, Any]) -> None:
        os.write(self._handle, json.dumps(entry).encode() + b"\n")


def read_blocks(directory: Path) -> dict[int, BlockSums]:
    """The blocks that are written according to all journals."""
    found: dict[int, BlockSums] = {}
    for path in directory.glob("written-*.jsonl"):
        found.update(written_blocks(path.read_bytes()))
    return found


def sync_earlier_blocks(directory: Path, sync: Callable[[], None]) -> None:
    """Sync what earlier processes of this machine noted, and note so for other machines."""
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


def written_blocks(journal: bytes) -> list[tuple[int, BlockSums]]:
    """The blocks that are certainly written according to one journal."""
    lines = _lines(journal)
    blocks = _blocks(lines)
    same_boot = bool(lines) and lines[0].get("boot") == boot()
    return blocks if same_boot else blocks[: _synced(lines)]


def _lines(journal: bytes) -> list[dict[str, Any]]:
    """The complete lines; a line that was cut off does not count."""
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
    blocks = [line for line in lines if "block" in line]
    return [(line["block"], [Sums(*values) for values in line["sums"]]) for line in blocks]


def _synced(lines: list[dict[str, Any]]) -> int:
    return max((line["synced"] for line in lines if "synced" in line), default=0)


def boot() -> str:
    """Identifies one start of one machine; unknown starts are never the same."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.is_file() else f"unknown {secrets.token_hex(8)}"
