"""The training loop."""

from __future__ import annotations

import gc
import itertools
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import Meter, say
from cpt_merge.data.packing import TrainingSequences
from cpt_merge.tracking import Tracker
from cpt_merge.training.callbacks.observe import Observer
from cpt_merge.training.callbacks.preview import Preview
from cpt_merge.training.callbacks.throughput import Throughput
from cpt_merge.training.callbacks.watchdog import Watchdog
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.backend import Backend, StepOutcome
from cpt_merge.training.distributed.checkpoint import Checkpoints, TrainState
from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.distributed.stopping import StopRequest
from cpt_merge.training.optimizer import rate_factor
from cpt_merge.training.phases import Phase
from cpt_merge.training.prefetch import Prefetcher, micro_batches

COLLECT_STEPS = 200  # steps between two collections of garbage, at the same step on all processes


@dataclass(frozen=True)
class StepResult:
    """What one step did, still on the device."""

    loss: Tensor  # nats per target, over all processes
    targets: int
    outcome: StepOutcome


@dataclass
class Trainer:
    """Everything that a step needs."""

    config: TrainingConfig
    phase: Phase
    backend: Backend
    rows: TrainingSequences
    bytes_per_token: float
    checkpoints: Checkpoints
    observer: Observer
    throughput: Throughput
    watchdog: Watchdog
    parallel: Parallel
    tracker: Tracker
    preview: Preview | None = None
    skipped: int = 0  # steps in a row that were left out
    _unread: tuple[int, StepResult] | None = None  # a step whose outcome is still on the device

    def train(self, state: TrainState, stop: StopRequest) -> TrainState:
        """Train from `state` to the end of the phase, or until asked to stop. A checkpoint is saved in either case."""
        config = self.config
        plan = itertools.chain.from_iterable(
            map(self._micro_batches, range(state.step, self.phase.stop))
        )
        with (
            Meter("train", config.steps, "steps", done=state.step) as meter,
            Prefetcher(self.rows, plan, self.parallel.device) as batches,
            _collecting_garbage_together(),
        ):
            while True:
                if self._owes_observation(state):
                    with self.throughput.paused():
                        if not self.observer.observe(self.backend, state, stop):
                            break  # the next attempt owes it
                    state = replace(state, observed=state.step)
                    self.watchdog.beat(f"the evaluation after step {state.step}")
                if self._owes_preview(state) and not stop.agreed():
                    self._preview(state)
                    state = replace(state, previewed=state.step)
                if state.step and state.step % config.checkpoints.every == 0:
                    self._save(state)
                if state.step == self.phase.stop:
                    break
                result = self.step(state, batches, stop)
                if result is None:
                    break
                state = self._advance(state, result)
                meter.advance(1)
                self.watchdog.beat(f"step {state.step}")
                if state.step % config.log_every == 0 or state.step == self.phase.stop:
                    meter.note = self._log(state, result)
                if state.step % COLLECT_STEPS == 0:
                    gc.collect()
        self._save(state)
        self.checkpoints.finish()
        return state

    def _owes_observation(self, state: TrainState) -> bool:
        due = state.step % self.config.evaluate_every == 0 or state.step == self.config.steps
        return due and state.observed < state.step

    def _owes_preview(self, state: TrainState) -> bool:
        return (
            self.preview is not None
            and self.preview.is_due(state.step, self.config.steps)
            and state.previewed < state.step
        )

    def _preview(self, state: TrainState) -> None:
        """Show the chat model; of weights that are not finite none can be made, and training itself will say so."""
        assert self.preview is not None
        self._read_outcome()
        if self.parallel.any(not self.backend.weights_are_finite()):
            return
        with self.throughput.paused():
            self.preview.show(self.backend, state.step, state.tokens)
        self.watchdog.beat(f"the preview after step {state.step}")

    def step(self, state: TrainState, batches: Prefetcher, stop: StopRequest) -> StepResult | None:
        """One optimizer step over `global_batch_size` rows of the run, this process taking its share of them.

        None if all processes agreed to stop before its end; then nothing has changed.
        """
        config, first = self.config, state.step * self.config.global_batch_size
        targets = self.rows.targets(range(first, first + config.global_batch_size))
        total = torch.zeros((), device=self.parallel.device)
        micro = self._micro_batches(state.step)
        for number in range(len(micro)):
            if self.checkpoints.failed:
                stop.report_trouble()
            if stop.agreed():
                self.backend.discard_gradients()
                return None
            with self.throughput.waiting_for_data():
                batch = batches.next()
            total += self.backend.backward(batch, 1 / targets, last=number == len(micro) - 1)
        self._read_outcome()  # of the step before: by now the device has got there, so nobody waits
        dist.all_reduce(total)
        factor = rate_factor(state.step - self.phase.start, self.phase.steps, config.schedule)
        outcome = self.backend.step(factor)
        self.throughput.count_step()
        return StepResult(total, targets, outcome)

    def _micro_batches(self, step: int) -> list[list[int]]:
        config = self.config
        return micro_batches(
            step * config.global_batch_size,
            config.global_batch_size,
            config.micro_batch_size,
            self.parallel,
        )

    def _advance(self, state: TrainState, result: StepResult) -> TrainState:
        """The state after a step."""
        self._unread = (state.step + 1, result)
        tokens, targets = state.tokens + self.config.tokens_per_step, state.targets + result.targets
        return replace(state, step=state.step + 1, tokens=tokens, targets=targets)

    def _read_outcome(self) -> None:
        """Look at what the last step found, if that has not been done; the same on all processes."""
        if self._unread is None:
            return
        (step, result), self._unread = self._unread, None
        self.observer.look_for_spike(step, float(result.loss))
        if bool(result.outcome.finite):
            self.skipped = 0
            return
        self.skipped += 1
        say(f"training: step {step} left out: its gradient is not finite ({self.skipped} in a row)")
        self.tracker.alert("non-finite gradient", f"step {step} left out, {self.skipped} in a row")
        if self.skipped >= self.config.max_skipped_steps:
            self.checkpoints.finish()
            raise UserError(
                f"{self.skipped} steps in a row had a non-finite gradient (training.max_skipped_steps); the last good "
                f"checkpoint is {self.checkpoints.newest() or 'none'}; lower training.optimizer.learning_rate or look "
                "at the data."
            )

    def _log(self, state: TrainState, result: StepResult) -> str:
        """Send a row of metrics. Returns the short form, for the progress line."""
        self._read_outcome()
        loss = float(result.loss)
        metrics = {
            "train/loss": loss,
            "train/gradient_norm": float(result.outcome.gradient_norm),
            "train/tokens": float(state.tokens),
            "train/bytes": state.tokens * self.bytes_per_token,
            "train/phase": float(self.phase.number + 1),
            **self.backend.learning_rates(),
            **self.throughput.metrics(),
        }
        self.tracker.log(metrics, step=state.step)
        return f"loss {loss:.3f}  {metrics['train/tokens_per_second']:,.0f} tokens/s"

    def _save(self, state: TrainState) -> None:
        with self.throughput.stalled_by_checkpoint():
            self._check_finite(state)  # before older checkpoints make room for this one
            layout, spikes = self.backend.layout, self.observer.spikes.state_dict()
            logged = self.tracker.record()
            state = replace(
                state, layout=layout, spikes=spikes, skipped=self.skipped, tracking=logged
            )
            self.checkpoints.save(self.backend, state)

    def _check_finite(self, state: TrainState) -> None:
        """Raises `UserError` if the weights are not finite: neither a checkpoint nor a model is made of them."""
        self._read_outcome()
        if self.parallel.any(not self.backend.weights_are_finite()):
            self.tracker.alert(
                "training diverged", f"the weights are not finite after step {state.step}"
            )
            self.checkpoints.finish()
            raise UserError(
                f"training diverged before step {state.step} (the weights are not finite); the last good "
                f"checkpoint is {self.checkpoints.newest() or 'none'}; lower training.optimizer.learning_rate or look "
                "at the data."
            )


class _collecting_garbage_together:  # noqa: N801 - reads as a sentence in a `with`
    """Python's collector pauses one process at a time, and all wait for it; here all collect at the same steps."""

    def __enter__(self) -> None:
        gc.collect()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        gc.enable()
