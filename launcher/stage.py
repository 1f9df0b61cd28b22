"""What a stage is, and a stage that is about to run. `stages.py` lists the stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cpt_merge.core.artifact import StageRecord, read_record, stage_key
from cpt_merge.core.errors import UserError
from cpt_merge.core.world import World, find_world

if TYPE_CHECKING:
    from cpt_merge.launcher.recipe import Recipe
    from cpt_merge.launcher.run import Run
    from cpt_merge.tracking import Tracker


@dataclass(frozen=True)
class Output:
    """What a stage makes for later stages: its kind, and the attribute of `Run` with its path."""

    kind: Literal["tokenizer", "model", "store"]
    attribute: str


@dataclass(frozen=True)
class Stage:
    """One stage. `config` and the fingerprints of what it reads decide whether it has to run."""

    name: str  # also its folder in the run's folder
    command: str  # `cpt-merge COMMAND`
    help: str
    config: Callable[[Recipe], Mapping[str, Any]]
    inputs: Mapping[str, Stage]  # what it reads of earlier stages, by the name of the input
    # the fingerprints of everything else that it reads, or that takes the place of an input
    reads: Callable[[Run], dict[str, str]]
    run: Callable[[StageContext, Tracker], dict[str, Any]]  # fills its folder, returns its results
    marker: str  # a file in its folder; a stage that lacks it is not finished
    output: Output | None = None
    is_complete: Callable[[Path], bool] = Path.exists  # called with the marker's path
    spread: Literal["once", "nodes", "tasks"] = "once"  # one process; one a node; one a GPU or task
    module: str | None = None  # `python -m MODULE RECIPE` runs it in one process of several
    resumable: bool = False  # when it was cut short, its folder is kept and it continues there
    precious: bool = False  # when its settings change, its folder is moved aside, never removed
    grows: bool = False  # with more tokens it continues an earlier result (`launcher/growth.py`)
    accumulates: bool = False  # it runs even if it is finished, and adds to its folder

    @property
    def distributed(self) -> bool:
        """Whether it runs in all processes."""
        return self.spread == "tasks"

    def fingerprint(self, run: Run) -> str:
        """The fingerprint of the finished stage. Raises `UserError` if it is not finished."""
        record = read_record(run.folder(self.name))
        if record is None:
            raise UserError(
                f"{run.folder(self.name)} is not finished; "
                f"run `cpt-merge {self.command} RECIPE` (or `run`) first."
            )
        return f"stage:{record.key}"


@dataclass(frozen=True)
class StageContext:
    """A stage of a run with all that decides its result. Prepared once, then passed on."""

    run: Run
    stage: Stage
    config: dict[str, Any]
    inputs: dict[str, str]  # fingerprints by name
    key: str  # a digest of config and inputs
    world: World = field(default_factory=find_world)

    @property
    def folder(self) -> Path:
        """The stage's folder."""
        return self.run.folder(self.stage.name)

    def finished(self) -> StageRecord | None:
        """The record of the result with this key; None if it is missing or incomplete."""
        record = read_record(self.folder)
        if record is None or record.key != self.key:
            return None
        return record if self.stage.is_complete(self.folder / self.stage.marker) else None


def prepare(run: Run, stage: Stage, known: Mapping[str, str] | None = None) -> StageContext:
    """The context of a stage. `known` are fingerprints of inputs that are about to be finished.

    Raises `UserError` if a stage that it needs is not finished.
    """
    run.recall_digests()
    config, known, read = dict(stage.config(run.recipe)), known or {}, stage.reads(run)
    made = {
        name: known.get(name) or other.fingerprint(run)
        for name, other in stage.inputs.items()
        if name not in read
    }
    inputs = {**made, **read}
    return StageContext(run, stage, config, inputs, stage_key(stage.name, config, inputs))


def is_up_to_date(run: Run, stage: Stage) -> bool:
    """Whether the stage and all stages that it builds on are finished for this recipe."""
    if read_record(run.folder(stage.name)) is None:
        return False  # before its inputs are looked at, some of which may be on the hub
    try:
        finished = prepare(run, stage).finished()
    except UserError:
        return False
    return finished is not None and all(
        is_up_to_date(run, other) for other in stage.inputs.values()
    )
