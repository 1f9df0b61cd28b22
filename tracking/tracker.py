"""What stages log through.

Rank 0 logs to the local log and to W&B; the trackers of other ranks have no sinks.

An earlier attempt of the same stage has left rows in the local log. The first event decides what
happens to them:

- After `resume_from(step)`, rows up to the checkpoint's step stay and later ones are cut off,
  because those steps are repeated. The local log then contains each step once, as it led to the
  final model.
- Without it, or with step 0, the stage starts over, and so does its local log.

W&B gets the same. Rows that stay and that it lacks (a kill loses the last second) are sent again.
Rows that it has cannot be taken back, so what it has of a step is not sent again, metric by metric:
of a repeated step, W&B keeps the first attempt's value. Resuming is exact, so with the same world
size both values are equal.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cpt_merge.core.redaction import without_secrets
from cpt_merge.core.world import find_world
from cpt_merge.tracking.config import TrackingConfig
from cpt_merge.tracking.events import (
    STEP,
    Alert,
    Artifact,
    Cell,
    Curves,
    Event,
    File,
    Image,
    Scalars,
    Summary,
    Table,
)
from cpt_merge.tracking.sinks import Sink
from cpt_merge.tracking.sinks.local import LocalLog, RunIdentity, read_run

NODE_RUN = "system"  # the job type of a run that only measures a node


class Tracker:
    """One stage's log: turns each call into an event for every sink.

    `Tracker()` has none and drops everything.
    """

    def __init__(self, sinks: Sequence[Sink] = (), record: Mapping[str, str] | None = None) -> None:
        self._sinks = sinks
        self._record = dict(record or {})
        self._begun = False
        self._early: list[Alert] = []  # alerts from before it was decided which rows are kept

    def resume_from(self, step: int) -> None:
        """Say that the stage continues from a checkpoint of `step`, or starts over (0).

        Call it before logging.
        """
        self._begin(step or None)

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars by name (`group/name`).

        `step`, the optimizer step, becomes `train/step`, not W&B's own step.
        """
        row = {
            name: value if isinstance(value, int) else float(value)
            for name, value in metrics.items()
        }
        self._write(Scalars(row if step is None else {**row, STEP: step}))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Log a table, displayed as a whole; it replaces an earlier one of the same name."""
        self._write(Table(name, list(columns), [*map(list, rows)]))

    def curves(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Log a table whose columns are a curve's name, x and y, displayed as a chart."""
        self._write(Curves(name, list(columns), [*map(list, rows)]))

    def image(self, name: str, path: Path) -> None:
        """Log a picture (PNG) that was written to `path`."""
        self._write(Image(name, path))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Add to the final values of the stage."""
        self._write(Summary(dict(values)))

    def file(self, name: str, path: Path) -> None:
        """Keep the small file `path` with the run under `name`."""
        self._write(File(name, path))

    def artifact(self, artifact: Artifact) -> None:
        """Record what the stage used or made, from which W&B draws the lineage. Nothing is copied.

        It may be called before `resume_from`: inputs are known before it is known where the stage
        continues.
        """
        self._send(Artifact(**without_secrets(asdict(artifact))))

    def alert(self, title: str, text: str) -> None:
        """Report something that a person should look at now."""
        job = os.environ.get("SLURM_JOB_ID")
        event = Alert(title, without_secrets(f"{text} (Slurm job {job})" if job else text))
        if self._begun:
            self._send(event)
        else:  # a stage that ends before it logs anything must not lose the earlier attempt's rows
            self._early.append(event)

    def finish(self, failed: bool = False) -> None:
        """Flush and close; after an offline run it prints the `cpt-merge sync` command."""
        if self._early:
            self._begin(math.inf)
        for sink in self._sinks:
            sink.finish(failed)

    def record(self) -> dict[str, str]:
        """Mode, run id and group, for `stage.json`; empty on ranks other than 0."""
        return dict(self._record)

    def _begin(self, kept: float | None = None) -> None:
        """Decide, once, what is kept of an earlier attempt."""
        if self._begun:
            return
        self._begun = True
        for sink in self._sinks:
            sink.begin(kept)
        for alert in self._early:
            self._send(alert)
        self._early.clear()

    def _write(self, event: Event) -> None:
        self._begin()
        self._send(event)

    def _send(self, event: Event) -> None:
        for sink in self._sinks:
            sink.write(event)


def start_tracker(
    config: TrackingConfig,
    stage: str,
    run_name: str,
    group: str,
    directory: Path,
    settings: dict[str, Any],
    run_id: str,
) -> Tracker:
    """The tracker of one stage.

    All its files are under `directory`, which must not move before it is uploaded.

    `run_id` is derived from the run, so that a second attempt continues the same W&B run; `group`
    joins the stages of a pipeline; `settings` is what W&B displays as the run's config. Raises
    `UserError` if the mode is online and there is no API key.
    """
    world = find_world()
    run = RunIdentity(stage, run_name, group, run_id, without_secrets(settings))
    config = config.model_copy(update={"tags": without_secrets(config.tags)})
    if world.is_main:
        sinks, mode = _open(config, run, directory)
        return Tracker(sinks, {"mode": mode, "run_id": run_id, "group": group})
    if (config.system_metrics, stage, world.local_rank) != ("nodes", "training", 0):
        return Tracker()
    if config.mode == "disabled":
        return Tracker()
    return Tracker([NodeSink(lambda: _open_node(config, run, directory))])


def _open_node(config: TrackingConfig, run: RunIdentity, directory: Path) -> Sequence[Sink]:
    """The run of this node, named after the run that rank 0 has opened by now."""
    opened, host = read_run(directory), socket.gethostname()
    run = replace(run, **{name: opened[name] for name in ("group", "run_id") if name in opened})
    node = RunIdentity(NODE_RUN, f"{run.run_name}-{host}", run.group, f"{run.run_id}-{host}", {})
    return _open(config, node, directory / "nodes" / node.run_id)[0]


def _open(config: TrackingConfig, run: RunIdentity, directory: Path) -> tuple[Sequence[Sink], str]:
    """The sinks of a run, the local log first, and W&B's mode."""
    local = LocalLog(directory.absolute())
    if config.mode != "disabled":
        from cpt_merge.tracking.sinks.wandb import start_wandb  # takes a second to import

        if remote := start_wandb(config, run, local.directory):
            local.open(run, config, remote.mode, remote.url)
            return [local, remote], remote.mode
    local.open(run, config, "disabled", "")
    return [local], "disabled"


class NodeSink:
    """One per node other than rank 0's, on request: W&B measures the node, and no event is logged.

    Each node has its own run in the group, because offline W&B has no runs of several
    processes. The run is opened by `begin`: earlier, rank 0 may still be preparing the stage's
    folder.
    """

    def __init__(self, open_sinks: Callable[[], Sequence[Sink]]) -> None:
        self._open = open_sinks
        self._sinks: Sequence[Sink] = ()

    def begin(self, kept: float | None) -> None:
        """Start to measure, unless the stage ends before it has begun."""
        if kept != math.inf:
            self._sinks = self._open()

    def write(self, event: Event) -> None:
        """Drop the event: rank 0 logs it."""

    def finish(self, failed: bool) -> None:
        """Stop measuring."""
        for sink in self._sinks:
            sink.finish(failed)
