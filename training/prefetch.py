"""A thread prepares micro-batches ahead of time, so that the device never waits for the disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from cpt_merge.data.packing import Batch, TrainingSequences
from cpt_merge.training.distributed.parallel import Parallel

AHEAD = 3  # micro-batches


def micro_batches(
    first: int, global_batch_size: int, micro_batch_size: int, parallel: Parallel
) -> list[list[int]]:
    """The indices of this process's sequences in the step that starts with `first`, by micro-batch.

    Every process has the same number of micro-batches; a step's sequences are dealt out in turn.
    """
    mine = range(first + parallel.rank, first + global_batch_size, parallel.size)
    return [
        list(mine[start : start + micro_batch_size])
        for start in range(0, len(mine), micro_batch_size)
    ]


class Prefetcher:
    """The micro-batches of one process; leaving the `with` block ends its thread."""

    def __init__(
        self, sequences: TrainingSequences, plan: Iterator[list[int]], device: torch.device
    ) -> None:
        """`plan` yields the indices of each micro-batch, in order."""
        self._sequences, self._plan, self._device = sequences, plan, device
        self._pool = ThreadPoolExecutor(1, "batches")
        self._pending: deque[Future[Batch]] = deque()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def next(self) -> Batch:
        """The next micro-batch, on the device. Raises what reading it raised."""
        while len(self._pending) < AHEAD and (indices := next(self._plan, None)) is not None:
            self._pending.append(self._pool.submit(self._make, indices))
        return self._pending.popleft().result().to(self._device)

    def _make(self, indices: list[int]) -> Batch:
        batch = self._sequences.batch(indices)
        return batch.pin_memory() if self._device.type == "cuda" else batch
