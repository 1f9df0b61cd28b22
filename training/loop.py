"""The training loop."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from core.errors import UserError
from core.progress import Meter, say
from tracking.tracker import Tracker
from training.checkpoints import Checkpoints, TrainState
from training.config import TrainingConfig
from training.model import CausalLM
from training.optimizer import rate_factor, set_rate
from training.packing import TrainingRows
from training.parallel import Parallel
from training.stopping import StopRequest
from training.throughput import Throughput
from training.validation import HeldoutRows, validate


@dataclass(frozen=True)
class StepResult:
    """What one step did."""

    loss: Tensor  # nats per target, this process's share of the global mean; on the device
    gradient_norm: float
    skipped: bool


@dataclass
class Trainer:
    """Everything that a step needs."""

    config: TrainingConfig
    module: CausalLM
    optimizer: torch.optim.Optimizer
    rows: TrainingRows
    heldout: list[HeldoutRows]
    checkpoints: Checkpoints
    parallel: Parallel
    tracker: Tracker

    def train(self, state: TrainState, stop: StopRequest) -> TrainState:
        """Train from `state` to the end of the budget, or until asked to stop. A checkpoint is saved in either case."""
        config, throughput = self.config, Throughput(self.config, self.parallel)
        with Meter("train", config.steps, "steps", done=state.step) as meter:
            if state.step == 0:
                self._validate(state)
            while state.step < config.steps and not stop.agreed():
                result = self.step(state.step)
                state = self._advance(state, result)
                throughput.count_step()
                if state.step % config.log_every == 0 or state.step == config.steps:
                    self._log(state, result, throughput, meter)
                if state.step % config.evaluate_every == 0 or state.step == config.steps:
                    self._validate(state)
                    throughput.restart()
                if state.step % config.checkpoint_every == 0 and not state.skipped:
                    self.checkpoints.save(self.module, self.optimizer, state)
                    throughput.restart()
                meter.advance(1)
        self._check_finite(state)
        self.checkpoints.save(self.module, self.optimizer, state)
        return state

    def _check_finite(self, state: TrainState) -> None:
        """Raises `UserError` if the weights are not finite: neither a checkpoint nor a model is made of them."""
        local = (parameter.to_local() for parameter in self.module.parameters() if isinstance(parameter, DTensor))
        if self.parallel.any(not all(bool(tensor.isfinite().all()) for tensor in local)) or state.skipped:
            self.tracker.alert("training diverged", f"the weights are not finite after step {state.step}")
            newest = self.checkpoints.newest()
            raise UserError(
                f"training diverged before step {state.step} (weights or gradients are not finite); the last good "
                f"checkpoint is {newest or 'none'}; lower training.optimizer.learning_rate or look at the data."
            )

    def step(self, step: int) -> StepResult:
        """One optimizer step over `batch_rows` rows of the run, this process taking its share of them."""
        config, world = self.config, self.parallel.world
        set_rate(self.optimizer, rate_factor(step, config.steps, config.schedule))
        first = step * config.batch_rows
        targets = self.rows.targets(range(first, first + config.batch_rows))
        mine = range(first + world.rank, first + config.batch_rows, world.size)
        total = torch.zeros((), device=self.parallel.device)
        starts = range(0, len(mine), config.micro_batch_rows)
        for start in starts:
            batch = self.rows.batch(list(mine[start : start + config.micro_batch_rows])).to(self.parallel.device)
            self.module.set_requires_gradient_sync(start == starts[-1])  # type: ignore[operator]
            # FSDP averages over the processes: the sum over all targets needs the world size back
            loss = self.module(batch) * (world.size / targets)
            loss.backward()
            total += loss.detach() / world.size
        norm = self._clip()
        finite = norm < float(
            "inf"
        )  # the norm is of the whole gradient, so all processes decide alike; NaN is not less
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(total, norm, skipped=not finite)

    def _clip(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.config.optimizer.clip)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _advance(self, state: TrainState, result: StepResult) -> TrainState:
        first = state.step * self.config.batch_rows
        skipped = state.skipped + 1 if result.skipped else 0
        if result.skipped:
            say(f"training: step {state.step + 1} left out: its gradient is not finite ({skipped} in a row)")
            self.tracker.alert("non-finite gradient", f"step {state.step + 1} left out, {skipped} in a row")
        if skipped >= self.config.max_skipped_steps:
            newest = self.checkpoints.newest()
            raise UserError(
                f"{skipped} steps in a row had a non-finite gradient (training.max_skipped_steps); the last good "
                f"checkpoint is {newest or 'none'}; lower training.optimizer.learning_rate or look at the data."
            )
        return replace(
            state,
            step=state.step + 1,
            tokens=state.tokens + self.config.tokens_per_step,
            targets=state.targets + self.rows.targets(range(first, first + self.config.batch_rows)),
            skipped=skipped,
        )

    def _log(self, state: TrainState, result: StepResult, throughput: Throughput, meter: Meter) -> None:
        loss = self.parallel.total(float(result.loss))
        metrics = {
            "train/loss": loss,
            "train/gradient_norm": result.gradient_norm,
            "train/learning_rate": max(group["lr"] for group in self.optimizer.param_groups),
            "train/tokens": float(state.tokens),
            **throughput.metrics(),
        }
        self.tracker.log(metrics, step=state.step)
        meter.note = f"loss {loss:.3f}  {metrics['train/tokens_per_second']:,.0f} tokens/s"

    def _validate(self, state: TrainState) -> None:
        start = time.monotonic()
        metrics = validate(self.module, self.heldout, self.config.micro_batch_rows, self.parallel)
        self.tracker.log({**metrics, "train/tokens": float(state.tokens)}, step=state.step)
        shown = [f"{name.split('/')[1]} {value:.3f}" for name, value in metrics.items() if name.endswith("byte")]
        say(f"step {state.step}: bits per byte {', '.join(shown)} ({time.monotonic() - start:.1f} s)")
