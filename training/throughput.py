"""Tokens per second and peak memory since the last report."""

from __future__ import annotations

import resource
import time

import torch

from training.config import TrainingConfig
from training.parallel import Parallel


class Throughput:
    """Counts steps against the clock; validation and checkpoints are left out by `restart`."""

    def __init__(self, config: TrainingConfig, parallel: Parallel) -> None:
        self.config, self.parallel = config, parallel
        self.restart()

    def restart(self) -> None:
        """Begin a new interval."""
        self._start, self._steps = time.monotonic(), 0

    def count_step(self) -> None:
        """One step is done."""
        self._steps += 1

    def metrics(self) -> dict[str, float]:
        """Rates of this interval; begins a new one."""
        seconds = time.monotonic() - self._start
        rate = self._steps * self.config.tokens_per_step / seconds
        self.restart()
        return {
            "train/tokens_per_second": rate,
            "train/tokens_per_second_per_device": rate / self.parallel.world.size,
            "train/peak_memory_gb": peak_memory(self.parallel.device) / 1e9,
        }


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: of the device's allocator, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
