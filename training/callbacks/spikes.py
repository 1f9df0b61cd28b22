"""Loss spikes: a loss far above those before it, and the sequences of that step."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpt_merge.core.progress import say
from cpt_merge.training.callbacks.callback import Callback, TrainerView

MINIMUM = 32  # losses before the first judgement; as many spikes in a row are a new level
FLOOR = 1e-3  # least standard deviation as a share of the mean, so that tiny noise has no spikes


@dataclass(frozen=True)
class Spike:
    """A loss above `mean` + sigma * `deviation`, both of the losses before it."""

    step: int
    loss: float
    mean: float
    deviation: float


class Spikes:
    """Finds spikes against mean and deviation of the last `window` losses that were none.

    Only a loss above the mean is a spike; a falling loss is below it, so the steep start of a run
    raises no alarm. A loss that is not finite always is one. After `MINIMUM` spikes in a row the
    loss has moved to another level, and the window starts over there.
    """

    def __init__(self, window: int = 128, sigma: float = 6.0) -> None:
        self.window, self.sigma = window, sigma
        self._losses: list[float] = []
        self._in_a_row = 0

    def observe(self, step: int, loss: float) -> Spike | None:
        """The loss of a step, the same on all processes; the spike if it is one."""
        spike = self._judge(step, loss)
        if spike is None:
            self._in_a_row = 0
            self._losses = [*self._losses, loss][-self.window :]
            return None
        self._in_a_row += 1
        if self._in_a_row == MINIMUM:
            self._losses, self._in_a_row = [], 0
        return spike

    def _judge(self, step: int, loss: float) -> Spike | None:
        count = len(self._losses)
        mean = math.fsum(self._losses) / count if count else math.nan
        deviation = (
            math.sqrt(math.fsum((value - mean) ** 2 for value in self._losses) / count)
            if count
            else math.nan
        )
        if not math.isfinite(loss):
            return Spike(step, loss, mean, deviation)
        limit = mean + self.sigma * max(deviation, FLOOR * abs(mean))
        return (
            Spike(step, loss, mean, deviation)
            if count >= min(MINIMUM, self.window) and loss > limit
            else None
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON values from which `load_state_dict` continues to the bit."""
        return {"losses": list(self._losses), "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._losses, self._in_a_row = (
            [float(loss) for loss in state["losses"]],
            int(state["in_a_row"]),
        )


def record_spike(
    path: Path, spike: Spike, indices: range, sequences: Sequence[tuple[str, int]]
) -> None:
    """Append a JSON line: the spike, and the step's sequences with their indices in the run.

    `sequences` is (source name, sequence of that source) by index. A number that is not finite is
    null. A step that is repeated after a resume gives the same line, which is not written twice.
    Call it on rank 0 only.
    """
    numbers = {
        name: value if math.isfinite(value) else None for name, value in asdict(spike).items()
    }
    places = {
        "first_index": indices[0],
        "last_index": indices[-1],
        "sequences": [list(place) for place in sequences],
    }
    line = json.dumps(numbers | places, ensure_ascii=False)
    if path.is_file() and line in path.read_text(encoding="utf-8").splitlines():
        return
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


class SpikeDetection(Callback):
    """Reports a loss far above those before it, with the sequences of that step."""

    name = "spikes"

    def attach(self, trainer: TrainerView) -> None:
        """See `Callback`."""
        super().attach(trainer)
        self.spikes = Spikes(sigma=trainer.config.spike_sigma)

    def outcome(self, step: int, loss: float, finite: bool) -> None:
        """See `Callback`."""
        spike = self.spikes.observe(step, loss)
        if spike is None:
            return
        trainer, size = self.trainer, self.trainer.config.global_batch_size
        indices, path = range((step - 1) * size, step * size), trainer.out / "spikes.jsonl"
        text = (
            f"step {step}: loss {loss:.3f}, the last ones {spike.mean:.3f} ± {spike.deviation:.3f}"
        )
        say(f"training: spike at {text}; sequences {indices[0]} to {indices[-1]}, listed in {path}")
        trainer.tracker.alert("loss spike" if math.isfinite(loss) else "non-finite loss", text)
        if trainer.parallel.is_main:
            record_spike(path, spike, indices, trainer.sequences.places(indices))

    def state_dict(self) -> dict[str, Any]:
        """See `Callback`."""
        return self.spikes.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Callback`."""
        if state:
            self.spikes.load_state_dict(state)
