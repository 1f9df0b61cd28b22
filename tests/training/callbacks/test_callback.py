"""The order of callbacks is the documented one, and what an interruption leaves undone stays due."""

import re
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

from cpt_merge.training.callbacks import callback
from cpt_merge.training.callbacks.callback import PeriodicCallback
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.run import default_callbacks


def test_the_order_is_the_documented_one() -> None:
    config = TrainingConfig(**{"tokens": 1, "preview": {"every": 1}})
    used = default_callbacks(config, cast(Any, (None, None)))
    documented = re.findall(r"^ +\d+ (\w+)", callback.__doc__ or "", re.MULTILINE)
    assert [type(one).__name__ for one in used] == documented
    assert len({one.name for one in used}) == len(used), "states in a checkpoint have unique names"


class Looks(PeriodicCallback):
    """Records the steps at which it looks; at some it is interrupted."""

    every = 5  # type: ignore[assignment]

    def __init__(self, interrupted: int | None = None) -> None:
        super().__init__()
        self.steps, self.interrupted = list[int](), interrupted

    def look(self) -> bool:
        step = self.trainer.state.step
        self.steps.append(step)
        return step != self.interrupted


def pass_steps(looks: Looks, first: int, last: int, stopping: bool = False) -> None:
    for step in range(first, last + 1):
        looks.trainer = cast(
            Any,
            SimpleNamespace(
                state=SimpleNamespace(step=step),
                config=SimpleNamespace(steps=12),
                stop=SimpleNamespace(agreed=lambda: stopping),
                timing=lambda what: nullcontext(),
            ),
        )
        looks.between_steps()


def test_a_periodic_callback_is_due_at_the_start_every_n_steps_and_at_the_end() -> None:
    looks = Looks()
    pass_steps(looks, 0, 12)
    assert looks.steps == [0, 5, 10, 12]
    pass_steps(looks, 12, 12)
    assert looks.steps == [0, 5, 10, 12], "a step is not looked at twice"


def test_what_was_interrupted_is_due_after_a_resume() -> None:
    cut = Looks(interrupted=5)
    pass_steps(cut, 0, 5)
    resumed = Looks()
    resumed.load_state_dict(cut.state_dict())
    pass_steps(resumed, 5, 12)
    assert resumed.steps == [5, 10, 12]


def test_nothing_long_begins_when_the_run_stops() -> None:
    looks = Looks()
    pass_steps(looks, 0, 5, stopping=True)
    assert looks.steps == []
    assert looks.done_at == -1
