"""The interface that stages log through. Rank 0 logs; the other ranks hold a tracker that drops everything.

An earlier attempt of the same stage leaves its rows in the local log. The first thing that is logged decides what
becomes of them:

- `resume_from(step)` was called: rows up to the checkpoint's step stay, later ones are cut off, for those steps are
  done again. The local log then holds each step once, as it led to the final model.
- it was not, or with step 0: the stage starts over, and so does its local log.

What W&B was sent cannot be taken back. So a row that it already has (same step, same metrics) is not sent again: W&B
keeps the first attempt's value of a step that is done twice. Resuming is exact (law 5), so on the same world size the
two values are the same. A kill costs W&B the rows of its last second; the local log loses none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from core.world import find_world
from tracking.config import TrackingConfig
from tracking.local import STEP, LocalLog, RunIdentity
from tracking.local import Cell as Cell  # part of the interface

RowKey = tuple[float | None, frozenset[str]]


class Carrier(Protocol):
    """One place where a stage's log goes."""

    def log(self, row: Mapping[str, float]) -> None:
        """Scalars; `train/step` among them where there is a step."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """A table, shown whole."""

    def image(self, name: str, path: Path) -> None:
        """A figure that was written to `path` (PNG)."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final values of the stage."""

    def alert(self, title: str, text: str) -> None:
        """Something a person should look at now."""


class RemoteCarrier(Carrier, Protocol):
    """A carrier that is told when the stage ends."""

    mode: str
    url: str  # where a browser finds the run; empty if nowhere

    def finish(self, failed: bool) -> None:
        """Flush and close."""


class Tracker(Protocol):
    """One stage's log. Metric names are `group/name` (`train/loss`)."""

    def resume_from(self, step: int) -> None:
        """The stage continues from a checkpoint of `step`; 0: it starts over. Call it before anything is logged."""

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

    def record(self) -> dict[str, str]:
        """Carrier, run id and group, for `stage.json`; empty off rank 0."""


def start_tracker(
    config: TrackingConfig,
    stage: str,
    run_name: str,
    group: str,
    directory: Path,
    settings: dict[str, Any],
    run_id: str,
) -> Tracker:
    """The tracker of one stage. Everything it writes lies under `directory`, which must stay where it is until synced.

    `run_id` is derived from the run, so that a second attempt continues the same W&B run; `group` joins the stages
    of a pipeline; `settings` is what W&B shows as the run's config. Raises `UserError` if W&B is asked for online
    and there is no key.
    """
    if not find_world().is_main:
        return SilentTracker()
    run = RunIdentity(stage, run_name, group, run_id, settings)
    local = LocalLog(directory.absolute(), run)
    remote: RemoteCarrier | None = None
    if config.carrier != "none":
        from tracking.wandb_carrier import start_wandb  # takes a second to import

        remote = start_wandb(config, run, local.directory)
    local.open(remote.mode if remote else "none", remote.url if remote else "")
    return StageTracker(local, remote)


class StageTracker:
    """Logs to the local log, and to W&B beside it."""

    def __init__(self, local: LocalLog, remote: RemoteCarrier | None) -> None:
        self._local, self._remote = local, remote
        self._carriers: list[Carrier] = [local, remote] if remote else [local]
        self._settled = False
        self._sent: Counter[RowKey] = Counter()  # rows that W&B already has and that will be logged again

    def resume_from(self, step: int) -> None:
        """See `Tracker`."""
        self._settle(step or None)

    def _settle(self, step: int | None) -> None:
        """Decide, once, what is kept of an earlier attempt."""
        if self._settled:
            return
        self._settled = True
        cut = self._local.keep_until(step)
        earlier = self._local.earlier
        if earlier.get("run_id") == self._local.run.run_id and earlier["carrier"] != "none":
            self._sent = Counter(map(_key, cut))

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """See `Tracker`."""
        self._settle(None)
        row = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        if step is not None:
            row[STEP] = step
        self._local.log(row)
        if self._sent[_key(row)]:
            self._sent[_key(row)] -= 1
        elif self._remote:
            self._remote.log(row)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """See `Tracker`."""
        self._settle(None)
        for carrier in self._carriers:
            carrier.table(name, columns, rows)

    def image(self, name: str, path: Path) -> None:
        """See `Tracker`."""
        self._settle(None)
        for carrier in self._carriers:
            carrier.image(name, path)

    def summary(self, values: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self._settle(None)
        for carrier in self._carriers:
            carrier.summary(values)

    def alert(self, title: str, text: str) -> None:
        """See `Tracker`."""
        self._settle(None)
        for carrier in self._carriers:
            carrier.alert(title, text)

    def finish(self, failed: bool = False) -> None:
        """See `Tracker`."""
        if self._remote:
            self._remote.finish(failed)

    def record(self) -> dict[str, str]:
        """See `Tracker`."""
        run = self._local.run
        return {
            "carrier": self._remote.mode if self._remote else "none",
            "run_id": run.run_id,
            "group": run.group,
        }


class SilentTracker:
    """Drops everything: what the ranks other than 0 hold, and tests that log nothing."""

    def resume_from(self, step: int) -> None:
        """Drop."""

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Drop."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Drop."""

    def image(self, name: str, path: Path) -> None:
        """Drop."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Drop."""

    def alert(self, title: str, text: str) -> None:
        """Drop."""

    def finish(self, failed: bool = False) -> None:
        """Drop."""

    def record(self) -> dict[str, str]:
        """Nothing."""
        return {}


def _key(row: Mapping[str, float]) -> RowKey:
    return row.get(STEP), frozenset(row) - {"time"}
