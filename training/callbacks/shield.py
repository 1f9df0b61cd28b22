"""Chooses the frozen columns of source-shielded updates before the first step that trains them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say, timed
from cpt_merge.data.packing import PackedDocuments, stack
from cpt_merge.training.callbacks.callback import Callback
from cpt_merge.training.config import ShieldConfig
from cpt_merge.training.shield import Shield


class SourceShield(Callback):
    """Measures what the source language needs, once, on the first sequences of its text."""

    name = "shield"

    def __init__(self, config: ShieldConfig) -> None:
        self.config = config

    @contextmanager
    def phase(self) -> Iterator[None]:
        """See `Callback`. The choice is kept next to the checkpoints, so all attempts agree."""
        trainer = self.trainer
        if trainer.phase.train == "all":
            path = trainer.out / "shield.npz"
            if not trainer.parallel.any(path.is_file()):
                shield = self._choose()
                if trainer.parallel.is_main:
                    shield.write(path)
                trainer.parallel.barrier()
            shield = Shield.read(path)
            share = trainer.backend.shield(shield)
            say(
                f"shield: {self.config.share:.0%} of the columns of {len(shield.frozen)} linear "
                f"layers are frozen, {share:.1%} of all parameters"
            )
        yield

    def _choose(self) -> Shield:
        trainer, parallel, size = self.trainer, self.trainer.parallel, self.config.sequences
        store, length = trainer.sequences.store, trainer.config.sequence_length
        packed = [
            PackedDocuments(store.documents(source, "train"), length)
            for source in store.info.sources
            if source.language == self.config.language
        ]
        places = [(one, number) for one in packed for number in range(one.sequences)][:size]
        if not places:
            raise UserError(
                f"training.shield.language = {self.config.language}, but its training text fills "
                f"no sequence of {length} tokens; add text in it, or name another language."
            )
        with timed(f"importance of columns for {self.config.language}"):
            batches = (
                stack([places[min(first + parallel.rank, len(places) - 1)]])
                for first in range(0, len(places), parallel.size)
            )
            found = trainer.backend.importance(batch.to(parallel.device) for batch in batches)
        return Shield.of(found, self.config.share)
