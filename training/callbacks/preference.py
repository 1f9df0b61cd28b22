"""Pairs of replies: the reference's log probabilities before the first step, and the margins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import timed
from cpt_merge.data.packing import PackedDocuments, stack
from cpt_merge.data.pairs import Reference
from cpt_merge.training.callbacks.callback import Callback


class PreferencePairs(Callback):
    """Computes what the model that training starts from makes of all replies, once.

    Logs how well the trained model tells the preferred reply from the other: `train/preferred` is
    the share of pairs with a positive margin, `train/margin` the mean margin.
    """

    name = "preference"

    def __init__(self) -> None:
        self._last: Tensor | None = None  # on the device

    @contextmanager
    def phase(self) -> Iterator[None]:
        """See `Callback`. The files are there before the first step, so also when it continues."""
        sequences, config = self.trainer.sequences, self.trainer.config
        for split in ("train", "heldout"):
            for source in sequences.store.info.sources:
                documents = sequences.store.documents(source, split)
                packed = PackedDocuments(documents, config.sequence_length, sequences.preference)
                self._refer(packed, f"{source.name}, {split}")
        yield

    def _refer(self, packed: PackedDocuments, what: str) -> None:
        """Write the reference of one split, unless an earlier attempt has."""
        trainer, preference = self.trainer, packed.preference
        assert preference
        path = preference.path(packed.documents.folder)
        if trainer.parallel.any(path.is_file()):
            return
        if trainer.state.step:
            raise UserError(
                f"{path} is gone, and the model that it was computed from is trained by now; put "
                f"it back, or remove {trainer.out} to begin again."
            )
        with timed(f"log probabilities of the reference: {what}"):
            by_sequence = self._log_probabilities(packed)
        if trainer.parallel.is_main:
            Reference.of(by_sequence).write(path)
        trainer.parallel.barrier()

    def _log_probabilities(self, packed: PackedDocuments) -> list[npt.NDArray[np.float32]]:
        """Of the replies of each sequence; the sequences are divided over the processes."""
        parallel, found = self.trainer.parallel, dict[int, npt.NDArray[np.float32]]()
        # the same number on all processes, since FSDP gathers weights in every forward pass
        for first in range(0, packed.sequences, parallel.size):
            number = first + parallel.rank
            batch = stack([(packed, min(number, packed.sequences - 1))], with_reference=False)
            values = self.trainer.backend.loss(batch.to(parallel.device))
            found[number] = values.float().cpu().numpy()
        everything = {n: values for part in parallel.gather(found) for n, values in part.items()}
        return [everything[number] for number in range(packed.sequences)]

    def after_step(self) -> None:
        """See `Callback`."""
        self._last = self.trainer.backend.take_margins()

    def metrics(self) -> dict[str, float]:
        """See `Callback`. Of the last step's pairs, over all processes."""
        if self._last is None:
            return {}
        margins = self._last.double()
        sums = torch.stack(
            [margins.sum(), (margins > 0).double().sum(), torch.ones_like(margins).sum()]
        )
        dist.all_reduce(sums)
        margin, preferred, count = sums.tolist()
        return {"train/margin": margin / count, "train/preferred": preferred / count}
