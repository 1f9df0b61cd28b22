"""Bootstrap intervals (Efron, 1979): how far a figure would move on other documents or prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
COVERAGE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure, its 95 % interval, and how many documents or prompts it rests on."""

    value: float
    low: float
    high: float
    n: int


def ratio(numerators: Sequence[float], denominators: Sequence[float], seed: int) -> Estimate:
    """sum(numerators) / sum(denominators), with the percentile interval of resampling the pairs with replacement.

    Where all pairs agree (every reply stopped) the interval has no width: the bootstrap knows what it saw and no more.
    """
    pairs = np.array([numerators, denominators], dtype=np.float64)
    n = pairs.shape[1]
    drawn = np.random.default_rng(seed).integers(0, n, size=(RESAMPLES, n))
    top, bottom = pairs[:, drawn].sum(axis=2)
    low, high = np.quantile(top / bottom, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Estimate(float(pairs[0].sum() / pairs[1].sum()), float(low), float(high), n)


def mean(values: Sequence[float], seed: int) -> Estimate:
    """The mean with its interval."""
    return ratio(values, [1.0] * len(values), seed)
