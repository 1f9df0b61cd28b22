"""The metrics of the training steps, and the line of progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cpt_merge.core.progress import Meter
from cpt_merge.data.mixture import bytes_per_token
from cpt_merge.training.callbacks.callback import Callback, TrainerView


class MetricsLog(Callback):
    """Logs every `log_every` steps, and at the end of a phase."""

    name = "log"

    def attach(self, trainer: TrainerView) -> None:
        """See `Callback`."""
        super().attach(trainer)
        self.bytes_per_token = bytes_per_token(trainer.sequences.store, trainer.shares)

    @contextmanager
    def phase(self) -> Iterator[None]:
        """See `Callback`."""
        trainer = self.trainer
        with Meter("train", trainer.config.steps, "steps", done=trainer.state.step) as self.meter:
            yield

    def after_step(self) -> None:
        """See `Callback`."""
        self.meter.advance(1)
        trainer, state, result = self.trainer, self.trainer.state, self.trainer.result
        if state.step % trainer.config.log_every and state.step != trainer.phase.stop:
            return
        trainer.read_outcome()
        loss = float(result.loss)
        metrics = {
            "train/loss": loss,
            "train/gradient_norm": float(result.outcome.gradient_norm),
            "train/tokens": float(state.tokens),
            "train/bytes": state.tokens * self.bytes_per_token,
            "train/phase": float(trainer.phase.number + 1),
            **trainer.backend.learning_rates(),
        }
        for callback in trainer.callbacks:
            metrics |= callback.metrics()
        trainer.tracker.log(metrics, step=state.step)
        rate = metrics.get("train/tokens_per_second", 0.0)
        self.meter.note = f"loss {loss:.3f}  {rate:,.0f} tokens/s"
