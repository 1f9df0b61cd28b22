"""Asked to stop: a signal to any one process, or the end of the job's time, and all stop after the same step."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from training.parallel import Parallel

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
MARGIN = 120.0  # seconds before SLURM_JOB_END_TIME at which to stop by itself


class StopRequest:
    """Collects requests within a `with` block. The handler only sets a flag; `agreed` is the collective decision."""

    def __init__(self, parallel: Parallel) -> None:
        self.parallel = parallel
        self.reason = ""
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        self._deadline = float(end) - MARGIN if end.isdigit() else float("inf")

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def agreed(self) -> bool:
        """True on all processes once any one has been asked to stop. A collective: called by all, at the same place."""
        if not self.reason and time.time() >= self._deadline:
            self.reason = "the job's time ends"
        stop = self.parallel.any(bool(self.reason))
        if stop and not self.reason:
            self.reason = "a signal to another process"
        return stop

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
