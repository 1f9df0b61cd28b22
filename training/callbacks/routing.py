"""How the routers of a mixture of experts used their experts in the last step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor

from cpt_merge.training.callbacks.callback import Callback

NAMES = ("train/router_loss", "train/router_entropy", "train/busiest_expert")


class RoutingLog(Callback):
    """Metrics of the routers, means over the micro-batches of all processes.

    They come from the forward passes of training. A dense model has none. No model that can be
    trained here drops tokens: experts of transformers take as many as are sent to them.
    """

    name = "routing"

    def __init__(self) -> None:
        self._last: Tensor | None = None  # on the device

    @contextmanager
    def phase(self) -> Iterator[None]:
        """See `Callback`. What the checks of a new model did is left out."""
        self.trainer.backend.take_routing()
        yield

    def after_step(self) -> None:
        """See `Callback`."""
        self._last = self.trainer.backend.take_routing()

    def metrics(self) -> dict[str, float]:
        """See `Callback`. A family without an auxiliary loss, or without one in use, has no loss
        here, and one whose routers do not name the experts has no share."""
        if self._last is None:
            return {}
        total = self._last.clone()
        dist.all_reduce(total)
        values = (total / self.trainer.parallel.size).tolist()
        return {
            name: value for name, value in zip(NAMES, values, strict=True) if not math.isnan(value)
        }
