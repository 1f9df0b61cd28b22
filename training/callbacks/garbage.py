"""Garbage collection at the same steps on all processes, since all wait for one that pauses."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from cpt_merge.training.callbacks.callback import Callback

EVERY = 200  # steps


class GarbageCollection(Callback):
    """Collects every `EVERY` steps, and never on Python's own initiative."""

    name = "garbage"

    @contextmanager
    def phase(self) -> Iterator[None]:
        """See `Callback`."""
        gc.collect()
        gc.disable()
        try:
            yield
        finally:
            gc.enable()

    def after_step(self) -> None:
        """See `Callback`."""
        if self.trainer.state.step % EVERY == 0:
            gc.collect()
