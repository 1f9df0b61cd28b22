"""TIES: where several vectors disagree about an element's sign, only those on the weightier side count.

Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpt_merge.checkpoint.dtypes import Float32


def elected_mean(scaled: Sequence[Float32]) -> Float32:
    """The mean of those of the vectors (each times its ratio) that have the elected sign, the sign of their sum.

    With one ratio for all this is the paper's disjoint mean times that ratio. One vector alone comes back as it is.
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
