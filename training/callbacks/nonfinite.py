"""Steps whose gradient is not finite: backends skip them, and too many in a row end the run."""

from __future__ import annotations

from typing import Any

from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.training.callbacks.callback import Callback


class NonFiniteSteps(Callback):
    """Counts and reports the steps that were left out."""

    name = "nonfinite"

    def __init__(self) -> None:
        self.in_a_row = 0

    def outcome(self, step: int, loss: float, finite: bool) -> None:
        """See `Callback`. Raises `UserError` after `max_skipped_steps` in a row."""
        if finite:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        trainer = self.trainer
        counted = f"{self.in_a_row} in a row"
        say(f"training: step {step} left out: its gradient is not finite ({counted})")
        trainer.tracker.alert("non-finite gradient", f"step {step} left out, {counted}")
        if self.in_a_row >= trainer.config.max_skipped_steps:
            trainer.checkpoints.finish()
            raise UserError(
                f"{self.in_a_row} steps in a row had a non-finite gradient "
                "(training.max_skipped_steps); the last good "
                f"checkpoint is {trainer.checkpoints.newest() or 'none'}; "
                "lower this stage's learning rate (training.optimizer.learning_rate, or that of "
                "finetune or dpo) or look at the data."
            )

    def state_dict(self) -> dict[str, Any]:
        """See `Callback`."""
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Callback`."""
        self.in_a_row = int(state.get("in_a_row", 0))
