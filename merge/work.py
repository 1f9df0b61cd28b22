"""A merge in progress, in the directory beside its output: processes share it, and a killed one continues.

Everything here is a function of the plan's digest, so nobody has to agree with anybody:

    unfinished          the marker, and in it the digest: made when all files have their size and header, removed last
    written-*.jsonl     what is written (`merge/journal.py`); blocks that are written twice get the same bytes
    ranges-*.json       what one process found of whole tensors (`merge/ranges.py`)
    failed-*, stopped-* why a process gave up, so that the others do too; after the former the work is of no use

The first process alone makes the directory and gives it its name; it holds a lock meanwhile.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.writer import SCRATCH, CheckpointFiles, CheckpointLayout
from cpt_merge.core.artifact import Staging, write_json
from cpt_merge.core.distributed import collect, publish, wait_for
from cpt_merge.core.errors import Interrupted, UserError
from cpt_merge.core.lock import Lock
from cpt_merge.core.progress import say
from cpt_merge.core.world import World
from cpt_merge.merge.journal import BlockSums, Journal, read_blocks, vouch


class Work:
    """The directory of a merge. `digest` tells merges apart; `world` says which of several processes this is."""

    def __init__(self, out: Path, layout: CheckpointLayout, digest: str, world: World) -> None:
        self.out, self.digest, self.world = out, digest, world
        self.staging = staging(out, digest)
        self.directory = self.staging.directory
        self.files = CheckpointFiles(self.directory, layout)
        self._lock = Lock(
            out.with_name(out.name + ".lock"), self.directory, "choose another output"
        )
        self._useless = out.with_name(
            out.name + ".failed"
        )  # for processes that begin when all is over
        self._journal: Journal | None = None
        self._started = time.time()
        self.opened = False

    def open(self) -> None:
        """Make the directory, or find it as an earlier attempt left it. Raises `UserError` if it is in use."""
        if self.world.is_main:
            self._lock.take()
            self._useless.unlink(missing_ok=True)
            self._make_directory()
        else:
            self.wait_for(lambda: self.staging.is_begun, "the first process to begin")
        self.opened = True
        vouch(self.directory, self._sync_all)
        self._journal = Journal(self.directory, self.world.rank, self.files.sync)

    def _make_directory(self) -> None:
        for why in [*self.directory.glob("failed-*"), *self.directory.glob("stopped-*")]:
            why.unlink()
        if self.staging.begin(self.files.create):
            say(f"merge: continuing what was cut short in {self.directory}")
            self.files.lay_out()  # a crash of the machine may have lost it

    def _sync_all(self) -> None:
        """Everything that anybody on this machine wrote."""
        for file in self.files.layout.headers:
            handle = os.open(self.directory / file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)

    @property
    def journal(self) -> Journal:
        """What this process has written; there while the work is open."""
        assert self._journal is not None, "the work is not open"
        return self._journal

    def finished_blocks(self) -> dict[int, BlockSums]:
        """What all processes have written, now and in earlier attempts."""
        return read_blocks(self.directory)

    # --- what processes tell one another ---

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for other processes. Raises the error of one that has failed."""
        wait_for(condition, what, check=self._raise_failure)

    def share(self, name: str, value: Any) -> list[Any]:
        """Give a value to all processes and get the values of all of them, by rank."""
        publish(self.directory, name, self.world, value)
        return collect(self.directory, name, self.world, self._raise_failure)

    def abandon(self, reason: str, useless: bool = False) -> None:
        """Let the others know, and let go of everything. What is `useless` is removed, else it can be continued."""
        if self.opened and self.world.size > 1:
            kind = "failed" if useless else "stopped"
            with suppress(FileNotFoundError):  # the first process has removed everything already
                (self.directory / f"{kind}-{self.world.rank:05d}").write_text(reason)
        if self._lock.held and useless and self.world.size > 1:
            write_json(self._useless, {"digest": self.digest, "reason": reason})
        self.close()
        if self.opened and useless and self.world.is_main:
            self._remove()

    def _remove(self) -> None:
        """Others may still be writing into it for a moment."""
        for _ in range(20):
            shutil.rmtree(self.directory, ignore_errors=True)
            if not self.directory.exists():
                return
            time.sleep(0.05)

    def _raise_failure(self) -> None:
        for kind, error in (("failed", UserError), ("stopped", Interrupted)):
            for path in self.directory.glob(f"{kind}-*"):
                if path.stat().st_mtime >= self._started - 1:  # not one of an earlier attempt
                    raise error(path.read_text())
        if not self.opened and self._useless.is_file():
            failure = json.loads(self._useless.read_text())
            if failure.get("digest") == self.digest:
                raise UserError(failure["reason"])
        if self.opened and not self.directory.exists() and not self.out.exists():
            raise UserError("the first process of this merge gave up; its own message says why.")

    # --- the end ---

    def publish(self) -> None:
        """Let the directory take its name."""
        self.journal.finish_sync()
        self.files.release()
        self.files.write_index()
        self.staging.commit()
        self.close()

    def close(self) -> None:
        """Give up the files, and the lock."""
        self.files.release()
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._lock.release()


def staging(out: Path, digest: str) -> Staging:
    """The directory that a merge is made in."""
    return Staging(out, digest, scratch=SCRATCH)
