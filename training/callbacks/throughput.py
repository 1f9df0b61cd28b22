"""How fast training is and what it waits for, since the last report."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.flops import mfu


class Throughput:
    """Counts steps and seconds of an interval. What lies in `paused` (evaluation) is no part of it.

    `flops_per_token` and `peak` (FLOP/s of one device) are those of `training.flops`; without both there is no MFU.
    """

    def __init__(
        self,
        config: TrainingConfig,
        parallel: Parallel,
        flops_per_token: float | None = None,
        peak: float | None = None,
    ) -> None:
        self.config, self.parallel = config, parallel
        self.flops_per_token, self.peak = flops_per_token, peak
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self._start, self._steps = time.monotonic(), 0
        self._paused = self._waited = self._stalled = 0.0

    def count_step(self) -> None:
        """One step is done."""
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training."""
        start = time.monotonic()
        yield
        self._paused += time.monotonic() - start

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around asking for the next batch."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextmanager
    def stalled_by_checkpoint(self) -> Iterator[None]:
        """Around the part of saving that the training waits for."""
        start = time.monotonic()
        yield
        self._stalled += time.monotonic() - start

    def metrics(self) -> dict[str, float]:
        """`train/...` of this interval, the same on all processes, which call it together; begins a new one.

        - `tokens_per_second`, `..._per_device`: by the clock of the slowest process; time stalled by checkpoints counts
        - `mfu`: share of the device's peak, 0 .. 1
        - `step_seconds_median`, `step_seconds_max`: over the processes, of each one's mean step without checkpoints.
          A step ends in a collective, so the processes wait for each other in it: the two part where one is late in
          what it does outside steps, and a slow device raises both
        - `data_wait_share`: share of the time spent waiting for batches, of the process that waits most
        - `checkpoint_stall_seconds`, `peak_memory_gb` (since the start): the largest of any process
        """
        seconds = time.monotonic() - self._start - self._paused
        peak_bytes = float(peak_memory(self.parallel.device))
        mine = [seconds, self._waited, self._stalled, peak_bytes]
        walls, waits, stalls, peaks = zip(*self.parallel.gather(mine), strict=True)
        steps = max(self._steps, 1)
        means = [(wall - stall) / steps for wall, stall in zip(walls, stalls, strict=True)]
        rate = self._steps * self.config.tokens_per_step / max(walls)
        per_device = rate / self.parallel.world.size
        self.restart()
        metrics = {
            "train/tokens_per_second": rate,
            "train/tokens_per_second_per_device": per_device,
            "train/step_seconds_median": statistics.median(means),
            "train/step_seconds_max": max(means),
            "train/data_wait_share": max(
                wait / wall for wait, wall in zip(waits, walls, strict=True)
            ),
            "train/checkpoint_stall_seconds": max(stalls),
            "train/peak_memory_gb": max(peaks) / 1e9,
        }
        if self.flops_per_token and self.peak:
            metrics["train/mfu"] = mfu(per_device, self.flops_per_token, self.peak)
        return metrics


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: of the device's allocator, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
