"""Agreement of two judges beyond what chance would give."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt


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
