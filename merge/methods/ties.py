"""TIES: trim vectors to their largest elements, elect signs, average what has the elected sign.

Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from cpt_merge.checkpoint.dtypes import Float32


def magnitude_threshold(parts: Callable[[], Iterable[Float32]], density: float) -> float:
    """The magnitude that the largest int(density * n) elements, at least one, reach.

    Exact, in two passes, without holding the elements: `parts` reads them anew at each call.
    Non-negative floats are ordered as their bits, so the first pass counts by the upper half of the
    bits and the second one, within the half that holds the threshold, by the lower half. With equal
    magnitudes at the threshold a few more elements reach it: which of them to drop would depend on
    the order.
    """
    upper = np.zeros(1 << 16, np.int64)
    for part in parts():
        upper += np.bincount(_bits(part) >> 16, minlength=1 << 16)
    if not upper.any():
        return 0.0
    wanted = max(int(density * int(upper.sum())), 1)
    half, above = _reached(upper, wanted)
    lower = np.zeros(1 << 16, np.int64)
    for part in parts():
        bits = _bits(part)
        lower += np.bincount(bits[bits >> 16 == half] & 0xFFFF, minlength=1 << 16)
    low, _ = _reached(lower, wanted - above)
    return float(np.array([half << 16 | low], np.uint32).view(np.float32)[0])


def _bits(part: Float32) -> NDArray[np.uint32]:
    return np.abs(np.ascontiguousarray(part).reshape(-1)).view(np.uint32)


def _reached(counts: NDArray[np.int64], wanted: int) -> tuple[int, int]:
    """The highest bin from which on there are `wanted` elements, and how many are above it."""
    from_above = counts[::-1].cumsum()
    place = int(np.searchsorted(from_above, wanted))
    return len(counts) - 1 - place, int(from_above[place - 1]) if place else 0


def keep_largest(d: Float32, threshold: float) -> Float32:
    """Elements of at least the threshold's magnitude, the others 0."""
    kept: Float32 = np.where(np.abs(d) >= np.float32(threshold), d, np.float32(0))
    return kept


def elected_mean(scaled: Sequence[Float32]) -> Float32:
    """The mean of the vectors, each times its ratio, that have the elected sign: that of their sum.

    With one ratio for all this is the paper's disjoint mean times that ratio. A single vector comes
    back as it is.
    """
    total = scaled[0].copy()
    for values in scaled[1:]:
        total += values
    side: Float32 = np.where(total >= 0, 1, -1).astype(np.float32)
    summed, count = np.zeros_like(total), np.zeros_like(total)
    for values in scaled:
        agrees = values * side > 0
        summed += np.where(agrees, values, np.float32(0))
        count += agrees
    summed /= np.maximum(count, np.float32(1))
    return summed
