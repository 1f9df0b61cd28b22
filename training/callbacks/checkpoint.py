"""When checkpoints are saved; `training/distributed/checkpoint.py` knows how."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cpt_merge.core.errors import UserError
from cpt_merge.training.callbacks.callback import Callback
from cpt_merge.training.schedule import branch_step


class CheckpointSaving(Callback):
    """Saves every `checkpoints.every` steps, at the end of a phase, and when the run stops.

    In the last phase also where the mixture changes, and with `wsd` where the learning rate begins
    to fall. These checkpoints are kept, because a longer run, or one with another mixture from
    there on, has the same steps up to there (`training/growth.py`).
    """

    name = "checkpoint"

    @contextmanager
    def phase(self) -> Iterator[None]:
        """See `Callback`."""
        trainer = self.trainer
        if trainer.phase.stop == trainer.config.steps:
            changes = {one.start for one in trainer.stretches if one.start > trainer.phase.start}
            falls = branch_step(trainer.curve, trainer.config.schedule)
            trainer.checkpoints.pinned = changes | {falls or 0}
        yield
        self._save()
        self.trainer.checkpoints.finish()

    def between_steps(self) -> None:
        """See `Callback`."""
        step = self.trainer.state.step
        checkpoints = self.trainer.checkpoints
        if step and (step % checkpoints.config.every == 0 or step in checkpoints.pinned):
            self._save()

    def before_micro_batch(self) -> None:
        """A checkpoint that could not be written on this process stops all of them."""
        if self.trainer.checkpoints.failed:
            self.trainer.stop.report_trouble()

    def _save(self) -> None:
        with self.trainer.timing("checkpoint"):
            self._check_finite()  # before older checkpoints make room for this one
            self.trainer.checkpoints.save(self.trainer.backend, self.trainer.state_to_save())

    def _check_finite(self) -> None:
        """Raises `UserError` if the weights are not finite: no checkpoint is made of them."""
        trainer = self.trainer
        trainer.read_outcome()
        if trainer.parallel.any(not trainer.backend.weights_are_finite()):
            step = trainer.state.step
            trainer.tracker.alert(
                "training diverged", f"the weights are not finite after step {step}"
            )
            trainer.checkpoints.finish()
            raise UserError(
                f"training diverged before step {step} (the weights are not finite); the last good "
                f"checkpoint is {trainer.checkpoints.newest() or 'none'}; "
                "lower this stage's learning rate (training.optimizer.learning_rate, or that of "
                "finetune or dpo) or look at the data."
            )
