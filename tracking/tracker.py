"""The interface that stages log through. Rank 0 logs; the other ranks hold a tracker that drops everything.

An earlier attempt of the same stage leaves its rows in the local log. The first thing that is logged decides what
becomes of them:

- `resume_from(step)` was called: rows up to the checkpoint's step stay, later ones are cut off, for those steps are
  done again. The local log then holds each step once, as it led to the final model.
- it was not, or with step 0: the stage starts over, and so does its local log.

W&B is brought to the same. Rows that stay and that it does not have (a kill costs it the last second) are sent again.
What it was sent cannot be taken back, so what it already has of a step is not sent again, metric by metric: W&B keeps
the first attempt's value of a step that is done twice. Resuming is exact (law 5), so on the same world size the
two values are the same.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from cpt_merge.core.world import find_world
from cpt_merge.tracking.config import TrackingConfig
from cpt_merge.tracking.redaction import without_secrets
from cpt_merge.tracking.sinks.local import STEP, LocalLog, Row, RunIdentity, read_run
from cpt_merge.tracking.sinks.local import Artifact as Artifact  # part of the interface, as is
from cpt_merge.tracking.sinks.local import Cell as Cell


class RemoteCarrier(Protocol):
    """Where a stage's log goes beside the local one. No call waits for a network."""

    mode: str
    url: str  # where a browser finds the run; empty if nowhere

    def begin(self, kept: Sequence[Row]) -> None:
        """Called once, before anything is logged: the rows of earlier attempts that the local log keeps."""

    def log(self, row: Mapping[str, float]) -> None:
        """Scalars; `train/step` among them where there is a step."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """A table, shown whole."""

    def curves(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """A table whose columns are a curve's name, x and y, shown as a chart."""

    def image(self, name: str, path: Path) -> None:
        """A figure that was written to `path` (PNG)."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final values of the stage."""

    def file(self, name: str, path: Path) -> None:
        """A small file, kept with the run."""

    def artifact(self, artifact: Artifact) -> None:
        """What the stage used, or leaves."""

    def alert(self, title: str, text: str) -> None:
        """Something a person should look at now."""

    def finish(self, failed: bool) -> None:
        """Flush and close, within a bounded time."""


class Tracker(Protocol):
    """One stage's log. Metric names are `group/name` (`train/loss`)."""

    def resume_from(self, step: int) -> None:
        """The stage continues from a checkpoint of `step`; 0: it starts over. Call it before anything is logged."""

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Scalars. `step` (the optimizer step) is logged beside them as `train/step`, never as W&B's own step."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """A table, shown whole."""

    def curves(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """A table whose columns are a curve's name, x and y, shown as a chart."""

    def image(self, name: str, path: Path) -> None:
        """A figure that was written to `path` (PNG)."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final values of the stage."""

    def file(self, name: str, path: Path) -> None:
        """A small file that was written to `path`, kept with the run under `name`."""

    def artifact(self, artifact: Artifact) -> None:
        """What the stage used, or leaves: W&B draws its lineage of them. Nothing is copied."""

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
    world = find_world()
    run = RunIdentity(stage, run_name, group, run_id, without_secrets(settings))
    config = config.model_copy(update={"tags": without_secrets(config.tags)})
    if not world.is_main:
        watched = (
            config.system_metrics == "nodes" and world.local_rank == 0 and config.carrier != "none"
        )
        return (
            NodeTracker(lambda: _open_node(config, run, directory)) if watched else SilentTracker()
        )
    return StageTracker(*_open(config, run, directory))


def _open_node(config: TrackingConfig, run: RunIdentity, directory: Path) -> RemoteCarrier | None:
    """The run of this node, named after that which rank 0 has opened by now."""
    opened = read_run(directory)
    named = {name: opened[name] for name in ("group", "run_id") if name in opened}
    node = replace(run, **named).of_node(socket.gethostname())
    return _open(config, node, directory / "nodes" / node.run_id)[1]


def _open(
    config: TrackingConfig, run: RunIdentity, directory: Path
) -> tuple[LocalLog, RemoteCarrier | None]:
    local = LocalLog(directory.absolute(), run)
    remote: RemoteCarrier | None = None
    if config.carrier != "none":
        from cpt_merge.tracking.sinks.wandb import start_wandb  # takes a second to import

        remote = start_wandb(config, run, local.directory)
    local.open(config, remote.mode if remote else "none", remote.url if remote else "")
    return local, remote


class StageTracker:
    """Logs to the local log, and to W&B beside it."""

    def __init__(self, local: LocalLog, remote: RemoteCarrier | None) -> None:
        self._local, self._remote = local, remote
        self._settled = False
        self._early: list[tuple[str, str]] = []  # alerts of before it was settled what is kept

    def resume_from(self, step: int) -> None:
        """See `Tracker`."""
        self._settle(step or None)

    def _settle(self, step: float | None = None) -> None:
        """Decide, once, what is kept of an earlier attempt: up to a step, or nothing."""
        if self._settled:
            return
        self._settled = True
        kept = self._local.keep_until(step)
        if self._remote:
            self._remote.begin(kept)
        for title, text in self._early:
            self._alert(title, text)

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """See `Tracker`."""
        self._settle()
        row = {
            name: value if isinstance(value, int) else float(value)
            for name, value in metrics.items()
        }
        if step is not None:
            row[STEP] = step
        self._local.log(row)
        if self._remote:
            self._remote.log(row)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """See `Tracker`."""
        self._settle()
        self._local.table(name, columns, rows)
        if self._remote:
            self._remote.table(name, columns, rows)

    def curves(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """See `Tracker`."""
        self._settle()
        self._local.table(name, columns, rows)
        if self._remote:
            self._remote.curves(name, columns, rows)

    def image(self, name: str, path: Path) -> None:
        """See `Tracker`."""
        self._settle()
        copy = self._local.image(name, path)
        if self._remote:
            self._remote.image(name, copy)

    def summary(self, values: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self._settle()
        self._local.summary(values)
        if self._remote:
            self._remote.summary(values)

    def file(self, name: str, path: Path) -> None:
        """See `Tracker`."""
        self._settle()
        copy = self._local.file(name, path)
        if self._remote:
            self._remote.file(name, copy)

    def artifact(self, artifact: Artifact) -> None:
        """See `Tracker`. What is used is known before it is known what is kept of an earlier attempt."""
        artifact = Artifact(**without_secrets(asdict(artifact)))
        self._local.artifact(artifact)
        if self._remote:
            self._remote.artifact(artifact)

    def alert(self, title: str, text: str) -> None:
        """See `Tracker`."""
        job = os.environ.get("SLURM_JOB_ID")
        text = without_secrets(f"{text} (Slurm job {job})" if job else text)
        if self._settled:
            self._alert(title, text)
        else:
            self._early.append(
                (title, text)
            )  # a stage that ends before it logs anything must not lose what there was

    def _alert(self, title: str, text: str) -> None:
        self._local.alert(title, text)
        if self._remote:
            self._remote.alert(title, text)

    def finish(self, failed: bool = False) -> None:
        """See `Tracker`."""
        if self._early:
            self._settle(math.inf)
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

    def curves(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Drop."""

    def image(self, name: str, path: Path) -> None:
        """Drop."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Drop."""

    def file(self, name: str, path: Path) -> None:
        """Drop."""

    def artifact(self, artifact: Artifact) -> None:
        """Drop."""

    def alert(self, title: str, text: str) -> None:
        """Drop."""

    def finish(self, failed: bool = False) -> None:
        """Drop."""

    def record(self) -> dict[str, str]:
        """Nothing."""
        return {}


class NodeTracker(SilentTracker):
    """On one process of each node but the first, where the recipe asks for it: W&B measures the node, no row is logged.

    A run of its own in the group, since offline W&B knows no run of several processes. It is opened by `resume_from`:
    before, the first process may still be making room for the stage's folder.
    """

    def __init__(self, open_run: Callable[[], RemoteCarrier | None]) -> None:
        self._open: Callable[[], RemoteCarrier | None] | None = open_run
        self._remote: RemoteCarrier | None = None

    def resume_from(self, step: int) -> None:
        """Begin to measure."""
        if self._open:
            self._remote, self._open = self._open(), None

    def finish(self, failed: bool = False) -> None:
        """Flush and close."""
        if self._remote:
            self._remote.finish(failed)
