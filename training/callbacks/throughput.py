"""How fast training is, and what it waits for, since the metrics were logged last."""

from __future__ import annotations

import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from transformers import AutoConfig

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.training.callbacks.callback import Callback, TrainerView
from cpt_merge.training.flops import flops_per_token, mfu, peak_flops
from cpt_merge.training.memory import ModelShape

PAUSES = ("evaluation", "continuations", "preview")  # no part of training


class Throughput(Callback):
    """Counts steps and seconds between two times that metrics are logged; pauses are left out.

    MFU needs FLOPs per token and the device's peak (`training.flops`); on a CPU the peak is known
    only from `peak_tflops`.
    """

    name = "throughput"

    flops: Mapping[int, float | None] = {}  # by length of a sequence; per token
    peak: float | None = None  # FLOP/s of one device

    def attach(self, trainer: TrainerView) -> None:
        """See `Callback`."""
        super().attach(trainer)
        config, device = trainer.config, trainer.parallel.device
        if config.peak_tflops:
            self.peak = config.peak_tflops * 1e12
        elif device.type == "cuda":
            self.peak = peak_flops(torch.cuda.get_device_name(device))
        if self.peak:
            model = trainer.inputs.model
            active = ModelShape.of(Checkpoint.open(model), str(model)).active
            shape = AutoConfig.from_pretrained(model, trust_remote_code=False)
            self.flops = {
                context.length: flops_per_token(shape, active, context.length)
                for context in (config.context, *config.contexts)
            }

    @contextmanager
    def phase(self) -> Iterator[None]:
        """See `Callback`."""
        self._restart()
        yield

    def _restart(self) -> None:
        self._start, self._steps = time.monotonic(), 0
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def after_step(self) -> None:
        """See `Callback`."""
        self._steps += 1

    def spent(self, what: str, seconds: float) -> None:
        """See `Callback`."""
        self._seconds[what] += seconds

    def metrics(self) -> dict[str, float]:
        """`train/...` of this interval, the same on all processes; starts a new interval.

        - `tokens_per_second`, `..._per_device`: by the clock of the slowest process; the time that
          checkpoints stall training counts
        - `mfu`: share of the device's peak, 0 .. 1
        - `step_seconds_median`, `step_seconds_max`: over the processes, of each one's mean step
          without checkpoints. Processes wait for each other in a step, so a slow device raises
          both; they differ if a process is late outside its steps
        - `data_wait_share`: share of the time spent waiting for batches, of the process that waits
          most
        - `checkpoint_stall_seconds`, `peak_memory_gb` (since the start): the largest of any process
        """
        config, parallel, spent = self.trainer.config, self.trainer.parallel, self._seconds
        seconds = time.monotonic() - self._start - sum(spent[what] for what in PAUSES)
        peak_bytes = float(_peak_memory(parallel.device))
        mine = [seconds, spent["data"], spent["checkpoint"], peak_bytes]
        walls, waits, stalls, peaks = zip(*parallel.gather(mine), strict=True)
        steps = max(self._steps, 1)
        means = [(wall - stall) / steps for wall, stall in zip(walls, stalls, strict=True)]
        rate = self._steps * config.tokens_per_step / max(walls)
        per_device = rate / parallel.size
        self._restart()
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
        flops = self.flops.get(config.sequence_length)
        if flops and self.peak:
            metrics["train/mfu"] = mfu(per_device, flops, self.peak)
        return metrics


def _peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: of the device's allocator, or resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
