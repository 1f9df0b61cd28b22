"""A watchdog: if no step ends for a while, every process writes where it hangs."""

from __future__ import annotations

import faulthandler
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO

from cpt_merge.training.callbacks.callback import Callback


class Watchdog:
    """Writes all threads' stacks to `folder`/stacks-rank-NNNNN.txt after `seconds` without a beat.

    It never ends a process. A daemon thread watches the clock: it runs while the main thread waits
    in a call that releases the GIL, as collectives and CUDA do. If the main thread holds the GIL,
    faulthandler's timer, a C thread, writes the stacks after 1.75 times as long, without a
    message. `seconds` must be longer than anything between two beats (a step, a compilation, an
    evaluation, a checkpoint) and shorter than the timeout of collectives.

    `alarm` is called in the daemon thread, once for each time that the process hangs.
    """

    def __init__(
        self, seconds: float, folder: Path, rank: int, alarm: Callable[[str], None]
    ) -> None:
        self.seconds, self.rank, self.alarm = seconds, rank, alarm
        self.path = folder / f"stacks-rank-{rank:05d}.txt"
        self._beat = ("start", time.monotonic())
        self._armed = 0.0
        self._file: IO[str] | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")
        self.beat("start")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._file:
            self._file.close()
        if self.path.stat().st_size == 0:
            self.path.unlink()

    def beat(self, what: str) -> None:
        """The process is alive, and has just done `what`."""
        now = time.monotonic()
        self._beat = (what, now)
        if now - self._armed > self.seconds / 4:  # arming takes 50 us: it starts a thread
            self._arm(now)

    def _arm(self, now: float) -> None:
        self._armed = now
        if self._file:
            faulthandler.dump_traceback_later(1.75 * self.seconds, repeat=True, file=self._file)

    def _watch(self) -> None:
        silent, alarmed = None, 0  # the last beat before a silence, and how often that was reported
        while not self._done.wait(min(1.0, self.seconds / 4)):
            beat = self._beat
            what, since = beat
            if beat is not silent:
                silent, alarmed = beat, 0
            waited = time.monotonic() - since
            if waited >= (alarmed + 1) * self.seconds:
                self._report(what, waited, first=alarmed == 0)
                alarmed = int(waited / self.seconds)

    def _report(self, what: str, waited: float, first: bool) -> None:
        assert self._file
        host = socket.gethostname()
        when = time.strftime("%Y-%m-%d %H:%M:%S %z")
        line = f"{when}  {host}, rank {self.rank}: {waited:.0f} s after {what!r}"
        print(line, file=self._file, flush=True)
        faulthandler.dump_traceback(file=self._file, all_threads=True)
        self._arm(time.monotonic())  # this thread runs, so the timer has nothing to add
        text = (
            f"rank {self.rank} on {host}: nothing for {waited:.0f} s after {what!r}; "
            f"stacks are in {self.path}"
        )
        print(
            text, file=sys.stderr, flush=True
        )  # on every rank: rank 0 is rarely the one that hangs
        if first:
            self._call(text)

    def _call(self, text: str) -> None:
        try:
            self.alarm(text)
        except Exception as error:  # a failing alarm must end neither this thread nor the training
            print(f"the alarm of the watchdog failed: {error!r}", file=sys.stderr, flush=True)


class StepWatchdog(Callback):
    """Watches the steps of a phase; the end of another callback's work is a sign of life too."""

    name = "watchdog"

    @contextmanager
    def phase(self) -> Iterator[None]:
        """See `Callback`."""
        trainer = self.trainer
        with Watchdog(
            trainer.config.watchdog,
            trainer.out / "stacks",
            trainer.parallel.rank,
            lambda text: trainer.tracker.alert("no step ends", text),
        ) as self._watchdog:
            yield

    def after_step(self) -> None:
        """See `Callback`."""
        self._watchdog.beat(f"step {self.trainer.state.step}")

    def spent(self, what: str, seconds: float) -> None:
        """See `Callback`."""
        if what != "data":
            self._watchdog.beat(f"the {what} after step {self.trainer.state.step}")
