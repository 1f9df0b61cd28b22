"""Which steps read which mixture: phases may have mixtures of their own.

A phase that changes nothing but the mixture continues its predecessor: optimizer, schedule and
weights know nothing of it (`training/phases.py`), and a run of another length or other later
mixtures has the same steps up to there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cpt_merge.core.errors import UserError
from cpt_merge.data.mixture import (
    SourceShare,
    bytes_per_token,
    describe,
    mixed,
    mixture,
    total_shares,
)
from cpt_merge.data.order import same_order
from cpt_merge.data.sources import Corpus
from cpt_merge.data.store import Store
from cpt_merge.training.config import TrainingConfig

Bounds = tuple[int, int]  # steps [start, stop)
Mixture = tuple[Mapping[str, float], Mapping[str, float]]  # weights of sources, shares of languages


@dataclass(frozen=True)
class Stretch:
    """Steps [start, stop) of the run, which read the sources in the same shares."""

    start: int
    stop: int
    shares: list[SourceShare]


def phase_bounds(config: TrainingConfig) -> list[Bounds]:
    """The steps of each of the recipe's phases; budgets are rounded up to whole steps.

    Raises `UserError` if that leaves a phase without a step.
    """
    found: list[Bounds] = []
    start = 0
    for place, phase in enumerate(config.phases):
        steps = -(-phase.tokens // config.tokens_per_step) if phase.tokens else config.steps
        stop = config.steps if place == len(config.phases) - 1 else min(start + steps, config.steps)
        if start == stop:
            raise UserError(
                f"training.phases.{place} has no step left: the ones before it, in whole steps of "
                f"{config.tokens_per_step:,} tokens, take all of training.tokens; "
                "raise that or lower their tokens."
            )
        found.append((start, stop))
        start = stop
    return found


def stretches_of(
    config: TrainingConfig, corpus: Corpus, available: Sequence[int | None]
) -> list[Stretch]:
    """The stretches of a run; `available` are the training tokens of each source, as in `mixture`.

    Raises `UserError` for amounts that do not fit, and names that the corpus does not have.
    """
    mixtures = list[tuple[Bounds, Mixture, int]]()
    for place, (bounds, phase) in enumerate(zip(phase_bounds(config), config.phases, strict=True)):
        own = phase.weights, phase.shares
        if mixtures and mixtures[-1][1] == own:
            (start, _), _, first = mixtures.pop()
            mixtures.append(((start, bounds[1]), own, first))
        else:
            mixtures.append((bounds, own, place))
    if len(mixtures) <= 1:
        weights, shares = mixtures[0][1] if mixtures else ({}, {})
        whole = mixture(mixed(corpus, weights, shares), available, config.tokens)
        return [Stretch(0, config.steps, whole)]
    found = []
    for (start, stop), (weights, shares), place in mixtures:
        tokens = (stop - start) * config.tokens_per_step
        try:
            found.append(
                Stretch(start, stop, mixture(mixed(corpus, weights, shares), available, tokens))
            )
        except UserError as error:
            raise UserError(f"training.phases.{place}: {str(error).rstrip('.')}.") from None
    return found


def whole_run(stretches: Sequence[Stretch]) -> list[SourceShare]:
    """What a run reads of each source."""
    if len(stretches) == 1:
        return stretches[0].shares
    return total_shares([stretch.shares for stretch in stretches])


def same_until(ones: Sequence[Stretch], others: Sequence[Stretch]) -> int:
    """The step up to which two runs over the same sources read the same sequences."""
    for one, other in zip(ones, others, strict=False):
        shares = [share.share for share in one.shares], [share.share for share in other.shares]
        if not same_order(*shares):
            return one.start
        if one.stop != other.stop:
            return min(one.stop, other.stop)
    return min(ones[-1].stop, others[-1].stop)


def bytes_read(stretches: Sequence[Stretch], store: Store, step: int, tokens: int) -> float:
    """The UTF-8 bytes of text that the steps before `step` read, of so many tokens each."""
    return sum(
        (min(step, stretch.stop) - stretch.start) * tokens * bytes_per_token(store, stretch.shares)
        for stretch in stretches
        if step > stretch.start
    )


def describe_stretches(stretches: Sequence[Stretch]) -> list[str]:
    """One line per source; of a run with several mixtures, those of each with its steps."""
    if len(stretches) == 1:
        return describe(stretches[0].shares)
    return [
        line
        for stretch in stretches
        for line in (
            f"steps {stretch.start + 1:,} to {stretch.stop:,}",
            *(f"  {of_source}" for of_source in describe(stretch.shares)),
        )
    ]
