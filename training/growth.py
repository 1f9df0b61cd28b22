"""Which checkpoint a run of another length continues from, and how its learning rate goes on.

The steps of a run do not depend on its length until its learning rate does. So a longer run
continues from the newest checkpoint up to which both have the same steps:

A later mixture that changed counts alike: steps before it do not depend on it. Phases that are
added after the earlier run's last one, such as longer sequences, continue its last checkpoint.

- wsd: the last one before the rate falls, which is always kept. What follows equals, bit for bit, a
  run that had the new length from the start. The warmup keeps the steps that it had.
- cosine and linear, whose rate depends on the length from the end of the warmup on (and wsd without
  such a checkpoint): the newest one. The rate rises again, from its value there to the peak, in the
  share `warmup` of the steps that are left, and falls until the new end (Ibrahim et al., Simple and
  Scalable Strategies to Continually Pre-train Large Language Models, 2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.checkpoint import (
    TrainState,
    complete_checkpoints,
    read_saved_state,
)
from cpt_merge.training.phases import Phase, phases_of
from cpt_merge.training.schedule import RateCurve


@dataclass(frozen=True)
class Branch:
    """What a run of another length continues from."""

    checkpoint: Path
    state: TrainState  # with which the new run continues
    newest: int  # the step that the earlier run had reached
    steps: int  # the earlier run's length
    rewarmed: bool  # whether the learning rate rises again

    @property
    def repeats(self) -> bool:
        """Whether steps that the earlier run has done are done again, at another rate."""
        return self.state.step < self.newest


def curve_of(state: TrainState, phase: Phase, config: TrainingConfig) -> RateCurve:
    """The learning rate of a phase, in a run that may have had another length."""
    if state.curve and phase.stop == config.steps:
        return RateCurve(**state.curve)
    return RateCurve.over(phase.start, phase.stop, config.schedule)


def find_checkpoint(
    directory: Path, old: TrainingConfig, new: TrainingConfig, key: str, same_until: int
) -> Branch | None:
    """What a run of `new` continues from, of the checkpoints that a run of `old` left.

    The two differ in their length, and in what they read after the step `same_until`; `key` is that
    of the new run. None: it starts anew.
    """
    olds, news = phases_of(old), phases_of(new)
    found = [(path, read_saved_state(path)) for path in complete_checkpoints(directory)]
    if not found:
        return None
    newest = found[-1][1]
    found = [(path, state) for path, state in found if state.step <= same_until]

    def branch(path: Path, state: TrainState, curve: RateCurve | None, rewarmed: bool) -> Branch:
        made = {"key": state.key, "step": state.step, "steps": old.steps, "rewarmed": rewarmed}
        continued = replace(
            state, key=key, curve=asdict(curve) if curve else {}, grown=[*state.grown, made]
        )
        return Branch(path, continued, newest.step, old.steps, rewarmed)

    if not found:
        return None
    path, state = found[-1]
    if len(news) > len(olds) and news[: len(olds)] == olds:
        # with a curve of its own, the rest of the last phase would have another one
        return None if state.curve and state.step < old.steps else branch(path, state, None, False)
    last, before = news[-1], olds[-1]
    if news[:-1] != olds[:-1] or last != replace(before, stop=last.stop):
        return None
    curve = curve_of(newest, before, old)
    longer = replace(curve, stop=last.stop)
    flat = min(curve.flat_until(old.schedule), longer.flat_until(new.schedule))
    if longer == curve:  # other tokens, but as many steps
        flat = last.stop
    for path, state in reversed(found):
        in_warmup = state.step < curve.start + curve.warmup
        if state.step <= flat and (state.step == found[-1][1].step or not in_warmup):
            return branch(path, state, longer if state.step > last.start else None, False)
    path, state = found[-1]
    if state.step >= last.stop or new.steps <= old.steps:
        return None
    origin = curve.factor(state.step - 1, old.schedule)
    again = RateCurve.over(state.step, last.stop, new.schedule, origin)
    return branch(path, state, again, True)


def describe_growth(grown: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a run continued, one text for each length that it had before."""
    return [
        f"steps 1 to {one['step']} of the {one['steps']} of {one['key']}"
        + (", then the learning rate rose again" if one["rewarmed"] else "")
        for one in grown
    ]


def recorded_config(recorded: Mapping[str, Any]) -> TrainingConfig:
    """The settings of a training, as far as they decide its weights, from its stage's record."""
    return TrainingConfig(
        **{name: value for name, value in recorded.items() if name in TrainingConfig.model_fields}
    )


def but_for_length(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The recorded settings that a run of another length shares with this one."""
    return {
        name: value
        for name, value in recorded.items()
        if name not in ("tokens", "phases", "mixture")
    }
