"""Where events go: the local log, and Weights & Biases."""

from __future__ import annotations

from typing import Protocol

from cpt_merge.tracking.events import Event


class Sink(Protocol):
    """One destination of a stage's events. No call waits for a network."""

    def begin(self, kept: float | None) -> None:
        """Keep the rows of earlier attempts up to step `kept` (None: no rows). Called once.

        `math.inf` keeps all: the stage ends before it knew where it continues. Only artifacts are
        written earlier.
        """

    def write(self, event: Event) -> None:
        """Take one event."""

    def finish(self, failed: bool) -> None:
        """Flush and close within a bounded time."""
