"""Stopping: a signal to any process, or the end of the job's time, stops all at one micro-batch."""

from __future__ import annotations

import signal
import time
from datetime import datetime
from types import FrameType

import torch
import torch.distributed as dist

from cpt_merge.core.deadline import deadline
from cpt_merge.core.progress import say
from cpt_merge.training.distributed.parallel import Parallel

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Collects requests within a `with` block.

    The signal handler only sets a flag; `agreed` makes the collective decision.
    """

    def __init__(self, parallel: Parallel, margin: float) -> None:
        self.parallel = parallel
        self.reason = ""
        self.stopping = False
        """All processes have agreed to stop."""
        self._trouble = False
        self._deadline = deadline() - margin
        self._vote: tuple[torch.Tensor, dist.Work] | None = None

    def __enter__(self) -> StopRequest:
        if self._deadline < float("inf"):
            when = datetime.fromtimestamp(self._deadline)
            say(f"training: saves and stops by itself at {when:%Y-%m-%d %H:%M:%S}")
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def was_asked(self) -> bool:
        """True on all processes if any of them has been asked to stop by now; a collective."""
        asked = self.parallel.any(bool(self.reason))
        if asked and not self.reason:
            self.reason = "a signal to another process"
        return asked

    def report_trouble(self) -> None:
        """Stop all processes through `agreed`, because something failed on this one."""
        self._trouble = True

    def agreed(self) -> bool:
        """True on all processes once any of them has been asked to stop, or has reported trouble.

        A collective, called between micro-batches and within an evaluation. It returns the result
        of the vote that the previous call started, so that nobody waits for the network.
        """
        if self.stopping:
            return True
        if not self.reason and time.time() >= self._deadline:
            self.reason = "the job's time ends"
        if self._vote:
            flags, work = self._vote
            work.wait()
            self.stopping = bool(flags.any())
        flags = torch.tensor([float(bool(self.reason) or self._trouble)])
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.parallel.group, async_op=True)
        assert work is not None
        self._vote = (flags, work)
        if self.stopping and not self.reason:
            self.reason = "a signal to another process"
        return self.stopping

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._vote and kind is None:
            self._vote[1].wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
