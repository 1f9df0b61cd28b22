"""What the loop asks of a backend, and what backends share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from cpt_merge.checkpoint.export import LocalShard
from cpt_merge.data.packing import Batch
from cpt_merge.training.config import CheckpointConfig, TrainingConfig
from cpt_merge.training.distributed.settings import BackendSettings
from cpt_merge.training.memory import Strategy
from cpt_merge.training.model.choice import Choice
from cpt_merge.training.shield import Shield

_TORCH, _EIGHT_BITS = "torch", "DeepSpeed, with moments in 8 bits"
_ALONE = ", trained weights alone"


def layout_of(asked: BackendSettings, config: TrainingConfig) -> str:
    """Who can load a checkpoint: all whose layout is the same, on any number of processes.

    FSDP2 divides 8-bit moments in blocks within rows, DeepSpeed in blocks of flat tensors, so it
    writes them in fp32. Runs with adapters write no frozen weights.
    """
    apart = asked.backend == "deepspeed" and config.optimizer.moments == "8bit"
    return (_EIGHT_BITS if apart else _TORCH) + (_ALONE if config.lora else "")


def is_readable(layout: str) -> bool:
    """Whether any backend can load it; DeepSpeed's own format, which was once written, none can."""
    return layout.removesuffix(_ALONE) in (_TORCH, _EIGHT_BITS)


@dataclass(frozen=True)
class StepOutcome:
    """What a step did, the same on all processes; tensors, so that nobody waits for the device."""

    gradient_norm: Tensor  # of the whole gradient, before clipping
    finite: Tensor  # bool: the step was taken; False: the norm is not finite, nothing has changed


class Backend(Protocol):
    """A model and its optimizer over all processes.

    Every method is a collective unless it says otherwise: all processes call it together.
    """

    layout: str  # of its checkpoints (`layout_of`)
    strategy: Strategy  # how memory is divided
    choice: Choice  # how packed documents are kept apart
    shard_count: int  # processes that it is divided over

    def loss(self, batch: Batch) -> Tensor:
        """What `CausalLM.forward` gives for this process's batch; no gradient."""

    def logits(self, input_ids: Tensor, last: Tensor) -> Tensor:
        """Logits [sequences, vocabulary], float32, no gradient.

        They follow place `last[i]` of sequence `input_ids[i]`; `input_ids` is [sequences, length].
        """

    def backward(self, batch: Batch, scale: float, last: bool) -> Tensor:
        """Add the gradient of `scale` times the summed loss of all processes' batches.

        `last`: no other micro-batch follows before `step`. Returns this process's part of the loss.
        The gradient contains that of the auxiliary loss of experts' routers, the loss does not.
        """

    def take_margins(self) -> Tensor | None:
        """The margins of this process's pairs since the last call, where replies are compared."""

    def take_routing(self) -> Tensor | None:
        """Auxiliary loss, entropy and largest share of this process's routers since the last call.

        Means over the micro-batches; None for a model without routers. Not a collective.
        """

    def importance(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """The importance of every column (`training/shield.py`) on all processes' batches.

        Every process gives as many batches.
        """

    def shield(self, shield: Shield) -> float:
        """Train no frozen column from now on; the share of all parameters that this is."""

    def step(self, factor: float) -> StepOutcome:
        """Clip, take an optimizer step at `factor` times the peak rates, and clear the gradient.

        A gradient that is not finite changes nothing: neither weights nor moments.
        """

    def discard_gradients(self) -> None:
        """Forget the micro-batches since the last step."""

    def learning_rates(self) -> dict[str, float]:
        """The rates of the last step, by the names that they are logged under."""

    def save(self, directory: Path, asynchronous: bool) -> Future[None]:
        """Write weights and optimizer, as they are now, into `directory`.

        The future is done when the bytes of all processes are on disk.
        """

    def writes_asynchronously(self, config: CheckpointConfig) -> bool:
        """Whether `save` returns before the bytes are written."""

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote."""

    def state_bytes(self) -> int:
        """How much `save` writes, over all processes."""

    def weights_are_finite(self) -> bool:
        """Whether this process's weights are; not a collective."""

    def parameter_names(self) -> set[str]:
        """The names of all parameters in the checkpoint; not a collective."""

    def shards(self) -> list[LocalShard]:
        """This process's part of the weights; each row is held by one process."""

    def replaced(self, replace: Callable[[LocalShard], Tensor]) -> AbstractContextManager[None]:
        """Run the model with other weights: what `replace` makes of each shard of the masters.

        Nothing is trained within the block. The masters never change, and afterwards the weights
        that run are restored bit for bit; they are kept in CPU memory during the block.
        """

    def describe(self) -> dict[str, str]:
        """Lines of the startup summary."""

    def close(self) -> None:
        """Free the memory."""


@contextmanager
def replaced(replacements: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Other values in some tensors within the block, and then the old ones again, bit for bit.

    `replacements` gives a tensor and its values one after the other. An error in it restores the
    tensors that were replaced before.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        try:
            for tensor, values in replacements:
                kept.append((tensor, tensor.detach().to("cpu", copy=True)))
                tensor.copy_(values)
            yield
        finally:
            for tensor, before in kept:
                tensor.copy_(before)
