"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cpt_merge.training.config import ScheduleConfig


@dataclass(frozen=True)
class RateCurve:
    """Steps [start, stop) of a run, in which the learning rate rises to its peak and falls."""

    start: int
    stop: int
    warmup: int  # steps in which it rises
    origin: float = 0.0  # what it rises from, as a factor of the peak

    @classmethod
    def over(
        cls, start: int, stop: int, schedule: ScheduleConfig, origin: float = 0.0
    ) -> RateCurve:
        """The curve of a schedule whose shares are of these steps."""
        return cls(start, stop, round(schedule.warmup * (stop - start)), origin)

    def flat_until(self, schedule: ScheduleConfig) -> int:
        """The step up to which no rate depends on where the curve stops."""
        if schedule.shape == "wsd":
            return self.stop - round(schedule.decay * (self.stop - self.start))
        return self.start + self.warmup

    def factor(self, step: int, schedule: ScheduleConfig) -> float:
        """The learning rate of a step as a factor of its peak."""
        done = step - self.start
        if done < self.warmup:
            return self.origin + (1 - self.origin) * ((done + 1) / (self.warmup + 1))
        falls = self.flat_until(schedule)
        progress = max(0.0, (step - falls) / max(1, self.stop - 1 - falls))
        if schedule.shape == "cosine":
            return schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * progress)) / 2
        return schedule.final + (1 - schedule.final) * (1 - progress)


def branch_step(curve: RateCurve, schedule: ScheduleConfig) -> int | None:
    """The step whose checkpoint is kept, because runs of other lengths continue from it."""
    return curve.flat_until(schedule) if schedule.shape == "wsd" else None
