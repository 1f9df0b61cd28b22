"""The training loop: build, loop, step.

What happens next to the steps (evaluation, previews, logging, checkpoints and so on) is done by
callbacks, whose order `training/callbacks/callback.py` documents.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from cpt_merge.checkpoint.dtypes import Dtype
from cpt_merge.checkpoint.export import LocalShard, export_shards, untrained_shards
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.errors import Interrupted
from cpt_merge.core.progress import say
from cpt_merge.tracking import Tracker
from cpt_merge.training.callbacks.callback import Callback, StepResult
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.backend import Backend
from cpt_merge.training.distributed.build import build_backend
from cpt_merge.training.distributed.checkpoint import Checkpoints, TrainState
from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.distributed.stopping import StopRequest
from cpt_merge.training.growth import curve_of
from cpt_merge.training.inputs import TrainingInputs, first_new_row, open_sequences
from cpt_merge.training.phases import Phase, PhaseSetup, phases_of
from cpt_merge.training.prefetch import Prefetcher, micro_batches
from cpt_merge.training.schedule import RateCurve
from cpt_merge.training.summary import startup_summary


class Trainer:
    """A run of training over all its phases. All processes call its methods together."""

    stop: StopRequest
    phase: Phase
    curve: RateCurve
    backend: Backend
    batches: Prefetcher
    result: StepResult

    def __init__(
        self,
        config: TrainingConfig,
        inputs: TrainingInputs,
        out: Path,
        tracker: Tracker,
        parallel: Parallel,
        callbacks: Sequence[Callback],
    ) -> None:
        """Check that everything fits, and open it. Raises `UserError` with what does not."""
        config.check_positions(Checkpoint.open(inputs.model).config)
        config.check_processes(parallel.size)
        self.whole = self.config = config
        self.inputs, self.out = inputs, out
        self.tracker, self.parallel, self.callbacks = tracker, parallel, callbacks
        self.phases = phases_of(config)
        self.base_rows = first_new_row(inputs, self.phases)
        self.in_context = {
            context: open_sequences(config.within(context), inputs) for context in config.contexts
        }
        self.sequences, self.stretches = open_sequences(config, inputs)
        self.checkpoints = Checkpoints(out / "checkpoints", config.checkpoints, parallel)
        self.checkpoints.start()
        self.state = TrainState(key=inputs.key)
        self._unread: StepResult | None = None  # the last step, if its outcome was not looked at
        for callback in callbacks:
            callback.attach(self)

    def train(self) -> None:
        """Train phase after phase, from the newest checkpoint on.

        Raises `Interrupted` when the run was asked to stop; everything is saved then.
        """
        with StopRequest(self.parallel, self.config.stop_margin) as self.stop:
            saved = self.checkpoints.read_state(self.inputs.key)
            self.state = saved or self.state
            self.tracker.resume_from(self.state.step)
            for callback in self.callbacks:
                callback.load_state_dict(self.state.callbacks.get(callback.name, {}))
            for phase in self.phases[self._first_phase(saved) :]:
                self.phase = phase
                self._build(saved if saved and saved.phase == phase.number else None)
                self._train_phase()
                if self.stop.was_asked():
                    text = f"after step {self.state.step} of {self.config.steps}"
                    raise Interrupted(
                        f"training stopped {text} ({self.stop.reason}); it is saved.",
                        self.stop.reason,
                    )
                if phase is not self.phases[-1]:
                    self.read_outcome()  # while its settings are there
                    self.export(self.shards(), self._exported(phase), "float32", extends=False)
                    self.backend.close()

    def _first_phase(self, saved: TrainState | None) -> int:
        """The checkpoint's phase, or the next one if that one's weights were exported already."""
        if saved is None:
            return 0
        phase = self.phases[saved.phase]
        over = saved.step == phase.stop and phase is not self.phases[-1]
        exported = over and self.parallel.any((self._exported(phase) / "config.json").is_file())
        return saved.phase + 1 if exported else saved.phase

    def _build(self, saved: TrainState | None) -> None:
        """Model and optimizer of a phase; `saved` is the state of a checkpoint of this phase."""
        phase = self.phase
        self.config = self.whole.within(phase.context)
        self.sequences, self.stretches = self.in_context[phase.context]
        fresh = saved is None and phase.number > 0  # otherwise any model of these shapes will do
        source = self._exported(self.phases[phase.number - 1]) if fresh else self.inputs.model
        setup = PhaseSetup(self.config, phase, source, self.base_rows)
        self.backend = build_backend(setup, self.parallel)
        say(startup_summary(setup, self.backend, self.parallel, self.stretches, self.sequences))
        if saved:
            self.checkpoints.load(self.backend, saved)
        self.state = replace(self.state, phase=phase.number)
        self.curve = curve_of(self.state, phase, self.config)

    def _train_phase(self) -> None:
        """Steps until the end of the phase, or until all processes agree to stop."""
        plan = itertools.chain.from_iterable(
            map(self._micro_batches, range(self.state.step, self.phase.stop))
        )
        with ExitStack() as stack:
            self.batches = Prefetcher(self.sequences, plan, self.parallel.device)
            stack.enter_context(self.batches)
            for callback in self.callbacks:
                stack.enter_context(callback.phase())
            self._between_steps()
            while self.state.step < self.phase.stop and not self.stop.stopping and self.step():
                for callback in self.callbacks:
                    callback.after_step()
                self._between_steps()

    def _between_steps(self) -> None:
        for callback in self.callbacks:
            callback.between_steps()

    def step(self) -> bool:
        """One optimizer step over `global_batch_size` sequences; this process takes its share.

        False if all processes agreed to stop before its end; then nothing has changed.
        """
        config, state = self.config, self.state
        first = state.step * config.global_batch_size
        targets = self.sequences.targets(range(first, first + config.global_batch_size))
        loss = torch.zeros((), device=self.parallel.device)
        micro = self._micro_batches(state.step)
        for number in range(len(micro)):
            for callback in self.callbacks:
                callback.before_micro_batch()
            if self.stop.agreed():
                self.backend.discard_gradients()
                return False
            with self.timing("data"):
                batch = self.batches.next()
            loss += self.backend.backward(batch, 1 / targets, last=number == len(micro) - 1)
        self.read_outcome()  # of the step before: by now the device has finished it
        dist.all_reduce(loss)
        outcome = self.backend.step(self.curve.factor(state.step, config.schedule))
        self.state = replace(
            state,
            step=state.step + 1,
            tokens=state.tokens + config.tokens_per_step,
            targets=state.targets + targets,
        )
        self.result = self._unread = StepResult(self.state.step, loss, targets, outcome)
        return True

    def _micro_batches(self, step: int) -> list[list[int]]:
        size = self.config.global_batch_size
        return micro_batches(step * size, size, self.config.micro_batch_size, self.parallel)

    def read_outcome(self) -> None:
        """See `TrainerView`."""
        if self._unread is None:
            return
        result, self._unread = self._unread, None
        for callback in self.callbacks:
            callback.outcome(result.step, float(result.loss), bool(result.outcome.finite))

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """See `TrainerView`."""
        start = time.monotonic()
        yield
        for callback in self.callbacks:
            callback.spent(what, time.monotonic() - start)

    def state_to_save(self) -> TrainState:
        """See `TrainerView`."""
        states = {callback.name: callback.state_dict() for callback in self.callbacks}
        return replace(
            self.state,
            layout=self.backend.layout,
            tracking=self.tracker.record(),
            callbacks={name: state for name, state in states.items() if state},
        )

    def shards(self) -> list[LocalShard]:
        """This process's part of the model; what is not trained is the first rank's."""
        trained = self.backend.parameter_names()
        untrained = untrained_shards(self.inputs.model, trained, self.parallel)
        return [*self.backend.shards(), *untrained]

    def export(
        self,
        shards: list[LocalShard],
        directory: Path,
        dtype: Dtype | None = None,
        extends: bool = True,
    ) -> None:
        """Write a Hugging Face checkpoint; in the model's own types if no type is given.

        Its config.json has the rotary positions of the last phase, unless `extends` is false.
        """
        if self.parallel.is_main:  # what an attempt left that was killed after the export
            shutil.rmtree(directory, ignore_errors=True)
        self.parallel.barrier()
        export_shards(
            shards, self.inputs.model, self.inputs.tokenizer, directory, self.parallel, dtype,
            extend=self.whole.extend if extends else None,
        )  # fmt: skip

    def _exported(self, phase: Phase) -> Path:
        return self.out / f"phase-{phase.number + 1}"

    def remove_phases(self) -> None:
        """Remove the weights between phases, which nobody needs once the last one is exported."""
        if self.parallel.is_main:
            for phase in self.phases:
                shutil.rmtree(self._exported(phase), ignore_errors=True)
