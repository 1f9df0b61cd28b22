"""The metrics of the training steps, and the line of progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cpt_merge.core.progress import Meter, say
from cpt_merge.training.callbacks.callback import Callback, TrainerView
from cpt_merge.training.stretches import bytes_read


class MetricsLog(Callback):
    """Logs every `log_every` steps, and at the end of a phase."""

    name = "log"

    def attach(self, trainer: TrainerView) -> None:
        """See `Callback`."""
        super().attach(trainer)
        stretches = trainer.stretches
        if len(stretches) > 1:
            mixtures = {
                f"train/mixture/{number}/{share.name}": round(share.share, 6)
                for number, stretch in enumerate(stretches, start=1)
                for share in stretch.shares
            }
            trainer.tracker.summary(mixtures)

    @contextmanager
    def phase(self) -> Iterator[None]:
        """See `Callback`."""
        trainer = self.trainer
        with Meter("train", trainer.config.steps, "steps", done=trainer.state.step) as self.meter:
            yield

    def between_steps(self) -> None:
        """See `Callback`."""
        step = self.trainer.state.step
        for number, stretch in enumerate(self.trainer.stretches, start=1):
            if step and stretch.start == step:
                read = [f"{one.name} {one.share:.2%}" for one in stretch.shares if one.share]
                say(f"training: mixture {number} from step {step + 1:,} on: {', '.join(read)}")

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
            "train/bytes": bytes_read(
                trainer.stretches,
                trainer.sequences.store,
                state.step,
                trainer.config.tokens_per_step,
            ),
            "train/phase": float(trainer.phase.number + 1),
            **self._mixture(),
            **trainer.backend.learning_rates(),
        }
        for callback in trainer.callbacks:
            metrics |= callback.metrics()
        trainer.tracker.log(metrics, step=state.step)
        rate = metrics.get("train/tokens_per_second", 0.0)
        self.meter.note = f"loss {loss:.3f}  {rate:,.0f} tokens/s"

    def _mixture(self) -> dict[str, float]:
        """Which of several mixtures the step read."""
        stretches, step = self.trainer.stretches, self.trainer.state.step
        if len(stretches) == 1:
            return {}
        return {"train/mixture": float(sum(stretch.start < step for stretch in stretches))}
