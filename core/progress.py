"""Progress of long work, from rank 0: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cpt_merge.core.redaction import without_secrets
from cpt_merge.core.world import find_world

# without emoji, a name such as `ko:a:` stays as it is
console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)

LOG_INTERVAL = 10.0  # seconds between two lines of progress in a log


def say(message: str) -> None:
    """Print one line to the user, from rank 0 only, without keys and passwords."""
    if find_world().is_main:
        console.print(without_secrets(message), markup=False)


@cache
def say_once(message: str) -> None:
    """`say` what follows from an input that is read several times."""
    say(message)


def counted(count: float, noun: str) -> str:
    """A number with its noun: `1 prompt`, `1,200 prompts`, `2 processes`, `3 replies`."""
    if count == 1:
        return f"{count:,} {noun}"
    if noun.endswith("ly"):
        return f"{count:,} {noun[:-1]}ies"
    return f"{count:,} {noun}{'es' if noun.endswith(('s', 'ch', 'x')) else 's'}"


def silence_bars() -> None:
    """Switch off the bars of Hugging Face's libraries and tqdm unless a terminal shows them.

    Call it before these libraries are imported. Processes that this one starts inherit it.
    """
    if not sys.stderr.isatty():
        for name in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")  # transformers obeys the hub's
        os.environ.setdefault("TQDM_DISABLE", "1")


class Meter:
    """A context manager that counts work against a total (None: unknown) and shows the progress.

    `done` is the work of an earlier attempt; it counts as progress, but not towards the rate.
    """

    def __init__(self, label: str, total: float | None, unit: str, done: float = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._done_before = done
        self.note = ""  # shown after the rate: a loss, a file name
        self._start = self._last_line = time.monotonic()
        self._shown = find_world().is_main
        self._bar = _bar() if self._shown and sys.stderr.isatty() else None
        if self._bar:
            self._task = self._bar.add_task(
                label, total=total, completed=int(done), amount=self._amount(), rate="", note=""
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
            self._line(ended=True)

    def advance(self, amount: float = 1) -> None:
        """Count `amount` more units as done."""
        self.done += amount
        if self._bar:
            self._bar.update(
                self._task,
                completed=self.done,
                amount=self._amount(),
                rate=self._rate(),
                note=self.note,
            )
        elif self._shown and time.monotonic() - self._last_line >= LOG_INTERVAL:
            self._line()

    def _amount(self) -> str:
        total = f"/{_short(self.total)}" if self.total else ""
        return f"{_short(self.done)}{total} {self.unit}"

    def _rate(self) -> str:
        rate = self._rate_value()
        return f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2f} {self.unit}/s"

    def _rate_value(self) -> float:
        return (self.done - self._done_before) / max(time.monotonic() - self._start, 1e-9)

    def _line(self, ended: bool = False) -> None:
        self._last_line = time.monotonic()
        parts = [f"{self.label}: {self._amount()}", self._rate()]
        if not ended and self.total and self.done < self.total and self._rate_value():
            parts.append(f"{(self.total - self.done) / self._rate_value():.0f} s left")
        else:
            parts.append(f"{self._last_line - self._start:.1f} s")
        console.print("  ".join([*parts, *([self.note] if self.note else [])]), markup=False)


def _short(amount: float) -> str:
    """1,234 or 0.0042."""
    return f"{amount:,.0f}" if amount >= 10 or amount == int(amount) else f"{amount:.2g}"


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
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
    """Print when a step of unknown length starts, and how long it took."""
    start = time.monotonic()
    say(f"{label} ...")
    yield
    say(f"{label}: {time.monotonic() - start:.1f} s")
