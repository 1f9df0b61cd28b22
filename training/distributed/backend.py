"""What the loop asks of a backend."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from cpt_merge.checkpoint.export import LocalShard
from cpt_merge.data.packing import Batch
from cpt_merge.training.config import CheckpointConfig
from cpt_merge.training.memory import Strategy


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step did; the same on all processes. Tensors, so that nobody waits for the device."""

    gradient_norm: Tensor  # of the whole gradient, before clipping
    finite: Tensor  # bool: the step was taken; False: norm not finite, nothing has changed


class Backend(Protocol):
    """A model and its optimizer over all processes. Every method is a collective: all processes call it together."""

    layout: str  # names who can load its checkpoints
    strategy: Strategy  # how memory is divided
    shard_count: int  # processes that it is divided over

    def loss(self, batch: Batch) -> Tensor:
        """Sum of the cross-entropies of this process's batch, in nats; no gradient."""

    def logits(self, input_ids: Tensor, last: Tensor) -> Tensor:
        """Logits [rows, vocabulary] after place `last[row]` of `input_ids` [rows, length], float32; no gradient."""

    def backward(self, batch: Batch, scale: float, last: bool) -> Tensor:
        """Add the gradient of `scale` times the summed loss of all processes' batches. Returns this process's share.

        `last`: no other micro-batch follows before `step`.
        """

    def step(self, factor: float) -> StepOutcome:
        """Clip, take an optimizer step at `factor` times the peak learning rates, and clear the gradient.

        A gradient that is not finite changes nothing: neither weights nor moments.
        """

    def discard_gradients(self) -> None:
        """Forget the micro-batches since the last step."""

    def learning_rates(self) -> dict[str, float]:
        """The rates of the last step, by the name they are logged under."""

    def save(self, directory: Path, asynchronous: bool) -> Future[None]:
        """Write weights and optimizer into `directory`; done when the bytes of all processes are on disk.

        What is written is the state at the time of the call.
        """

    def writes_asynchronously(self, config: CheckpointConfig) -> bool:
        """Whether `save` returns before the bytes are written."""

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote."""

    def state_bytes(self) -> int:
        """How much `save` writes, over all processes."""

    def weights_are_finite(self) -> bool:
        """Whether this process's weights are; not a collective."""

    def shards(self) -> list[LocalShard]:
        """This process's part of the weights; each row is held by one process."""

    def replaced(self, replace: Callable[[LocalShard], Tensor]) -> AbstractContextManager[None]:
        """Within the block the model runs with other weights: what `replace` makes of each shard of the masters.

        Nothing is trained there. Afterwards every bit of what runs is what it was; the masters never change. What it
        was lies in the memory of the CPU meanwhile.
        """

    def describe(self) -> dict[str, str]:
        """Lines of the start block."""

    def close(self) -> None:
        """Free the memory."""
