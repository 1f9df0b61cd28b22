"""Callbacks: everything that happens next to the training steps.

The loop (`training/trainer.py`) knows only the class `Callback`.

A new behaviour is a new file with a subclass, and a line in `training.run.default_callbacks`. That
list is the order in which every hook is called:

     1 StepWatchdog        knows first that a step has ended: a slow callback is no hanging step
     2 Throughput          counts the step before anything else takes time
     3 SpikeDetection      reports a loss before the next one may end the run
     4 NonFiniteSteps      ends the run after too many steps without a finite gradient
     5 RoutingLog          notes what the routers of experts did in the step
     6 MetricsLog          sends the step's metrics, those of the callbacks included
     7 GarbageCollection   pauses all processes at the same step
     8 HeldoutEvaluation   measures the weights that the checkpoint will hold ...
     9 Continuations
    10 Preview
    11 CheckpointSaving    ... and is last, to record what the others have done at this step

All processes call all hooks in the same order, so a hook may contain collectives. Nothing in a
callback changes what is trained.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from cpt_merge.data.packing import TrainingSequences
from cpt_merge.tracking import Tracker
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.backend import Backend, StepOutcome
from cpt_merge.training.distributed.checkpoint import Checkpoints, TrainState
from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.distributed.stopping import StopRequest
from cpt_merge.training.inputs import TrainingInputs
from cpt_merge.training.phases import Phase
from cpt_merge.training.schedule import RateCurve
from cpt_merge.training.stretches import Stretch


@dataclass(frozen=True)
class StepResult:
    """What one step did, still on the device; reading it waits for the device."""

    step: int  # the number of steps done, this one included
    loss: Tensor  # nats per target, over all processes
    targets: int
    outcome: StepOutcome


class TrainerView(Protocol):
    """What callbacks may use of the trainer."""

    config: TrainingConfig  # of the phase; before the first one, of the run
    inputs: TrainingInputs
    out: Path
    tracker: Tracker
    parallel: Parallel
    sequences: TrainingSequences
    stretches: list[Stretch]  # what is read of each source, and in which steps
    checkpoints: Checkpoints
    callbacks: Sequence[Callback]

    # from the first phase on
    stop: StopRequest
    phase: Phase
    curve: RateCurve  # of the phase's learning rate
    backend: Backend
    state: TrainState
    result: StepResult  # of the last step

    def timing(self, what: str) -> AbstractContextManager[None]:
        """Around what is no part of computing a step; calls `spent` of all callbacks at its end."""

    def read_outcome(self) -> None:
        """Call `outcome` of all callbacks for the last step, once; this waits for the device."""

    def state_to_save(self) -> TrainState:
        """The state with what the callbacks want to remember."""


class Callback:
    """The hooks, in the order in which a run calls them. None of them does anything here."""

    name: ClassVar[str] = ""
    """The key of its state in a checkpoint."""

    trainer: TrainerView

    def attach(self, trainer: TrainerView) -> None:
        """Before the model is built: check settings and open what is needed. Raises `UserError`."""
        self.trainer = trainer

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; an empty dictionary if there is none."""

    @contextmanager
    def phase(self) -> Iterator[None]:
        """Around the steps of each phase. The backend is built, and its checkpoint is loaded."""
        yield

    def between_steps(self) -> None:
        """Before the first step of a phase, between two steps, and after the last one.

        Long work asks `trainer.stop.agreed()` now and then, and is done again by the next attempt.
        """

    def before_micro_batch(self) -> None:
        """Before the vote on stopping."""

    def outcome(self, step: int, loss: float, finite: bool) -> None:
        """What this step did; called while the device computes the next one, so nobody waits."""

    def after_step(self) -> None:
        """A step was launched: `trainer.result`."""

    def metrics(self) -> dict[str, float]:
        """What to add to the metrics that are logged now."""
        return {}

    def spent(self, what: str, seconds: float) -> None:
        """A `TrainerView.timing` block has ended."""

    def state_dict(self) -> dict[str, Any]:
        """JSON values from which `load_state_dict` continues exactly."""
        return {}


class PeriodicCallback(Callback):
    """Looks at the model every `every` steps, also at step 0 and at the last one.

    What an interruption leaves undone is still due when the run continues, since the checkpoint
    records the last step at which it was done.
    """

    def __init__(self) -> None:
        self.done_at = -1  # the last step at which it was done

    @property
    @abstractmethod
    def every(self) -> int:
        """Steps between two times."""

    @abstractmethod
    def look(self) -> bool:
        """Do it. False if all processes agreed to stop before its end."""

    def between_steps(self) -> None:
        """Do it if it is due, unless the run stops."""
        step = self.trainer.state.step
        due = step % self.every == 0 or step == self.trainer.config.steps
        if due and self.done_at < step and not self.trainer.stop.agreed():
            with self.trainer.timing(self.name):
                finished = self.look()
            if finished:
                self.done_at = step

    def state_dict(self) -> dict[str, Any]:
        """See `Callback`."""
        return {"step": self.done_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Callback`."""
        self.done_at = int(state.get("step", -1))
