"""Intervals and differences: how far a metric would move on other documents or prompts.

A share of independent units has the exact interval of Clopper and Pearson (1934). Where units hold
several counted answers (turns, checks), the number of answers is first divided by the design
effect (Korn and Graubard, 1998): answers of one dialogue depend on each other.

Other metrics have Student's t interval of a ratio of means.

A difference between two models has the p-value of exchanging the models in a random half of the
units, which is exact for any number of them. Over many differences these are corrected by Holm
(1979).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

COVERAGE = 0.95
EXCHANGES = 10_000  # of the models, for a p-value
MOST_EXCHANGED = 500  # units; for more of them the exchanges are normally distributed

# unit (a document or conversation) -> (top, bottom); the metric is sum of tops / sum of bottoms
Parts = dict[int, tuple[float, float]]


@dataclass(frozen=True)
class Estimate:
    """A metric, its 95 % interval, and the number of documents or conversations behind it."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class PairedDifference(Estimate):
    """One model's metric minus another's over the same units.

    `p` is the chance of such a difference between equal models; `beyond` says that it is below
    5 % after the correction for the number of differences that were compared.
    """

    p: float
    beyond: bool = False


def estimate(parts: Parts, share: bool = False) -> Estimate:
    """sum of tops / sum of bottoms, with its interval; `share`: 0 <= top <= bottom.

    The mean of a single unit has no interval: both ends are the value.
    """
    pairs = np.array(list(zip(*parts.values(), strict=True)), dtype=np.float64)
    value = float(pairs[0].sum() / pairs[1].sum())
    answers = effective_answers(pairs) if share else None
    if answers is not None:
        low, high = exact_interval(value, answers)
    else:
        error = _error_of((pairs[0] - value * pairs[1]) / pairs[1].sum())
        least, most = (0.0, 1.0) if share else (-math.inf, math.inf)
        low, high = max(least, value - error), min(most, value + error)
    return Estimate(value, low, high, len(parts))


def _error_of(changes: npt.NDArray[np.float64]) -> float:
    """Half the width of the interval of a sum of independent terms; 0 for a single one."""
    n = len(changes)
    spread = ((changes - changes.mean()) ** 2).sum()
    return student_t(n) * math.sqrt(spread * n / max(n - 1, 1))


def effective_answers(pairs: npt.NDArray[np.float64]) -> int | None:
    """How many independent answers tell as much about a share as these units do.

    None for units that are shares themselves and not counted. If all answers agree nothing is known
    about their dependence, and each unit counts once.
    """
    tops, bottoms = pairs
    n, share = len(tops), tops.sum() / bottoms.sum()
    if share in (0, 1) or (bottoms.max() == 1 == bottoms.min() and set(tops) <= {0, 1}):
        return n
    if (pairs % 1).any():
        return None
    variance = n / max(n - 1, 1) * ((tops - share * bottoms) ** 2).sum() / bottoms.sum() ** 2
    few = (student_t(int(bottoms.sum())) / student_t(n)) ** 2
    return max(1, int(few * min(bottoms.sum(), share * (1 - share) / max(variance, 1e-12))))


def exact_interval(share: float, answers: int) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share of independent answers."""
    numbers = np.concatenate(([0.0], np.log(np.arange(1, answers + 1)).cumsum()))  # log k!
    ways = numbers[answers] - numbers - numbers[::-1]

    def at_least(found: int, chance: float) -> float:
        hits = np.arange(found, answers + 1)
        terms = hits * math.log(chance) + (answers - hits) * math.log1p(-chance)
        return float(np.exp(ways[found:] + terms).sum())

    def bound(found: int) -> float:
        """The chance at which as many hits or more are as rare as the interval allows."""
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if at_least(found, middle) < (1 - COVERAGE) / 2 else (low, middle)
            )
        return low

    hits = round(share * answers, 9)
    misses = answers - math.ceil(hits)
    return (
        bound(math.floor(hits)) if hits >= 1 else 0.0,
        1 - bound(misses) if misses > 0 else 1.0,
    )


def difference(
    parts: Parts, baseline: Parts, seed: int, share: bool = False
) -> PairedDifference | None:
    """The metric of `parts` minus that of `baseline`, over the units that both have.

    None if they have no unit in common. The interval is Student's t for the paired difference.
    That of a counted share is widened in the manner of Agresti and Min (2005), as if two more units
    had been seen, each of which only one of the models answered.
    """
    common = [unit for unit in parts if unit in baseline]
    if not common:
        return None
    ours, theirs = (
        np.array([of[unit] for unit in common], dtype=np.float64).T for of in (parts, baseline)
    )
    n = len(common)
    tops = ours[0] / ours[1].sum() - theirs[0] / theirs[1].sum()
    value = float(tops.sum())
    if share and not (ours % 1).any() and not (theirs % 1).any():
        changes = np.append(n * tops, [1.0, -1.0]) / (n + 2)
        middle, error = changes.sum(), _error_of(changes)
        low, high = max(-1.0, middle - error), min(1.0, middle + error)
    else:
        bottoms = [of[0].sum() / of[1].sum() ** 2 * of[1] for of in (ours, theirs)]
        error = _error_of(tops - bottoms[0] + bottoms[1])
        low, high = value - error, value + error
    return PairedDifference(value, low, high, n, chance_of(tops, seed))


def chance_of(changes: npt.NDArray[np.float64], seed: int) -> float:
    """How often the sum is as far from 0 or farther if each unit's change has a random sign."""
    found, spread = abs(changes.sum()), math.sqrt((changes**2).sum())
    if found <= 1e-12 or spread == 0:
        return 1.0
    if len(changes) > MOST_EXCHANGED:
        return math.erfc(found / spread / math.sqrt(2))
    if len(changes) <= math.log2(EXCHANGES):
        signs = 1.0 - 2 * (np.arange(2 ** len(changes))[:, None] >> np.arange(len(changes)) & 1)
        return float((abs(signs @ changes) >= found * (1 - 1e-9)).mean())
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (EXCHANGES, len(changes)))
    as_far = (abs(signs @ changes) >= found * (1 - 1e-9)).sum()
    bound = 2 * math.exp(-((found / spread) ** 2) / 2)  # Hoeffding's, for what is rarer than that
    return min(bound, float((as_far + 1) / (EXCHANGES + 1)))


def corrected(chances: Sequence[float]) -> list[float]:
    """Holm's correction: the smallest of m p-values times m, the next one times m - 1, ..."""
    order = sorted(range(len(chances)), key=chances.__getitem__)
    found, least = [0.0] * len(chances), 0.0
    for place, number in enumerate(order):
        least = max(least, min(1.0, chances[number] * (len(chances) - place)))
        found[number] = least
    return found


def fewest_units(differences: int) -> int:
    """Of how many units a difference can be beyond chance at all, if so many are compared.

    The models of n units can be exchanged in 2^n ways, of which 2 are the farthest from 0, so no
    p-value is below 2 / 2^n.
    """
    return math.floor(1 + math.log2(differences / (1 - COVERAGE))) + 1


def student_t(n: int) -> float:
    """The quantile of Student's t for n units.

    By the expansion of Abramowitz and Stegun (26.7.5), which is within 3 % from n = 3 on.
    """
    z, freedom = NormalDist().inv_cdf((1 + COVERAGE) / 2), max(n - 1, 1)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def kappa(ours: Sequence[Hashable], theirs: Sequence[Hashable]) -> float | None:
    """Cohen's kappa (1960): (p - e) / (1 - e), p the share of equal verdicts, e that by chance.

    None where it is not defined: without verdicts, or if all are the same.
    """
    if not ours:
        return None
    count = len(ours)
    equal = sum(one == other for one, other in zip(ours, theirs, strict=True)) / count
    chance = sum(ours.count(kind) * theirs.count(kind) for kind in set(ours)) / count**2
    return None if chance == 1 else (equal - chance) / (1 - chance)


def rank_correlation(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Spearman's correlation; equal marks share their mean rank.

    None if one judge gives the same mark to everything.
    """
    if len(set(ours)) < 2 or len(set(theirs)) < 2:
        return None
    return float(np.corrcoef(_ranks(ours), _ranks(theirs))[0, 1])


def _ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)
