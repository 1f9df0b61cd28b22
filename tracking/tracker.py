"""The interface that stages log through. Rank 0 logs; the other ranks hold a tracker that drops everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

Cell = str | int | float | bool | None


class Tracker(Protocol):
    """One stage's log. Metric names are `group/name` (`train/loss`)."""

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Scalars. `step` (the optimizer step) is logged beside them as `train/step`, never as W&B's own step."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """A table, shown whole."""

    def image(self, name: str, path: Path) -> None:
        """A figure that was written to `path` (PNG)."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final values of the stage."""

    def alert(self, title: str, text: str) -> None:
        """Something a person should look at now."""

    def finish(self, failed: bool = False) -> None:
        """Flush and close; says the `wandb sync` line after an offline run."""
