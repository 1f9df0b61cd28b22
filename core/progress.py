"""Progress of long work: a bar with rate and time left on a terminal, plain lines in a log, nothing off rank 0."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cpt_merge.core.world import find_world

console = Console(stderr=True, highlight=False, soft_wrap=True)

LOG_INTERVAL = 10.0  # seconds between two lines of progress where there is no terminal


def say(message: str) -> None:
    """One line to the user, from rank 0 only."""
    if find_world().is_main:
        console.print(message, markup=False)


class Meter:
    """Counts work done against a total (None: unknown) and shows it. Use as a context manager.

    `done` is what an earlier attempt has done already: it counts as progress, but not towards the rate.
    """

    def __init__(self, label: str, total: float | None, unit: str, done: float = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._done_before = done
        self.note = ""  # shown beside the rate: a loss, a file name
        self._start = self._last_line = time.monotonic()
        self._shown = find_world().is_main
        self._bar = _bar() if self._shown and sys.stderr.isatty() else None
        self._task = (
            self._bar.add_task(label, total=total, completed=int(done), rate="", note="")
            if self._bar
            else None
        )

    def __enter__(self) -> Meter:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif self._shown and kind is None:
            self._line()

    def advance(self, amount: float = 1) -> None:
        """`amount` more units are done."""
        self.done += amount
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, rate=self._rate(), note=self.note)
        elif self._shown and time.monotonic() - self._last_line >= LOG_INTERVAL:
            self._line()

    def _rate(self) -> str:
        rate = self._rate_value()
        return f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2f} {self.unit}/s"

    def _rate_value(self) -> float:
        return (self.done - self._done_before) / max(time.monotonic() - self._start, 1e-9)

    def _line(self) -> None:
        self._last_line = time.monotonic()
        elapsed = self._last_line - self._start
        parts = [
            f"{self.label}: {self.done:,.0f}"
            + (f"/{self.total:,.0f}" if self.total else "")
            + f" {self.unit}"
        ]
        parts.append(self._rate())
        if self.total and self.done < self.total and self._rate_value():
            parts.append(f"{(self.total - self.done) / self._rate_value():.0f} s left")
        else:
            parts.append(f"{elapsed:.1f} s")
        console.print("  ".join([*parts, *([self.note] if self.note else [])]), markup=False)


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    return Progress(
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )


@contextmanager
def timed(label: str) -> Iterator[None]:
    """Say a line when a step of unknown length starts and how long it took."""
    start = time.monotonic()
    say(f"{label} ...")
    yield
    say(f"{label}: {time.monotonic() - start:.1f} s")
