"""Bootstrap intervals (Efron, 1979): how far a metric would move on other documents or prompts.

The percentile interval is too narrow for few units: of 100 intervals over 7 units only 88 would
contain the truth. Its quantiles are moved outwards as far as Student's t is wider than the normal
distribution (Hesterberg, "What Teachers Should Know About the Bootstrap", 2015, the expanded
percentile interval).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000
COVERAGE = 0.95
FEWEST = 4  # units for a significant difference; fewer may all agree by chance

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
    """One model's metric minus another's over the same units. `beyond`: the interval excludes 0."""

    beyond: bool


def estimate(parts: Parts, seed: int) -> Estimate:
    """sum of tops / sum of bottoms, with the interval of resampling the units.

    If all units agree (every reply stopped), the interval has no width: the bootstrap cannot know
    what it has not seen.
    """
    pairs = np.array(list(zip(*parts.values(), strict=True)), dtype=np.float64)
    low, high = _interval(_resampled(pairs, seed), len(parts))
    return Estimate(float(pairs[0].sum() / pairs[1].sum()), low, high, len(parts))


def difference(parts: Parts, baseline: Parts, seed: int) -> PairedDifference | None:
    """The metric of `parts` minus that of `baseline`, over the units that both have.

    The paired bootstrap resamples both by the same draws, so that what a hard prompt does to both
    models cancels. None if they have no unit in common.
    """
    common = [unit for unit in parts if unit in baseline]
    if not common:
        return None
    ours, theirs = (
        np.array([of[unit] for unit in common], dtype=np.float64).T for of in (parts, baseline)
    )
    low, high = _interval(_resampled(ours, seed) - _resampled(theirs, seed), len(common))
    value = float(ours[0].sum() / ours[1].sum() - theirs[0].sum() / theirs[1].sum())
    beyond = len(common) >= FEWEST and not low <= 0 <= high
    return PairedDifference(value, low, high, len(common), beyond)


def _resampled(pairs: npt.NDArray[np.float64], seed: int) -> npt.NDArray[np.float64]:
    """The metric in each resample; the draws depend on the seed and the number of units alone."""
    n = pairs.shape[1]
    drawn = np.random.default_rng(seed).integers(0, n, size=(RESAMPLES, n))
    top, bottom = pairs[:, drawn].sum(axis=2)
    return np.asarray(top / bottom)


def _interval(values: npt.NDArray[np.float64], n: int) -> tuple[float, float]:
    tail = tail_of(n)
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def tail_of(n: int) -> float:
    """The share of the resamples of n units below the interval; it approaches 0.025.

    Phi(-sqrt(n / (n - 1)) t), with Student's t by the expansion of its quantile (Abramowitz and
    Stegun, 26.7.5), which is within 3 % from n = 3 on.
    """
    z, freedom = NormalDist().inv_cdf((1 + COVERAGE) / 2), max(n - 1, 1)
    t = (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
    return NormalDist().cdf(-t * math.sqrt(n / freedom))


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
