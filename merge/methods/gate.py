"""The gate: lower the vector, element by element, where CPT moved most.

    m = (|cpt - base| - low) / (high - low)    low, high: least and greatest in the tensor
    gate = 1 - sigmoid(12 m - 6)               0.998 where CPT moved least, 0.002 where most

maywell, EasyLLMFeaturePorter (https://huggingface.co/blog/maywell/llm-feature-transfer).

The sigmoid is read from a table, linearly between its points (error below 1e-6). The table is
computed in decimal arithmetic and everything else is single float32 operations, so the bytes are
the same on every processor, which no library promises for exp.
"""

from __future__ import annotations

from decimal import Decimal
from functools import cache

import numpy as np

from cpt_merge.checkpoint.dtypes import Float32

POINTS = 4096
STEEPNESS, MIDDLE = 12, 6


def movement(cpt: Float32, base: Float32) -> Float32:
    """|cpt - base|."""
    change: Float32 = np.abs(cpt - base)
    return change


def gate(change: Float32, low: float, high: float) -> Float32:
    """The factor for each element, from `movement` and its range in the whole tensor."""
    if not high > low:  # CPT moved every element equally far
        return np.full_like(change, table()[0])
    place = (change - np.float32(low)) / (np.float32(high) - np.float32(low)) * np.float32(POINTS)
    left = np.clip(place.astype(np.int32), 0, POINTS - 1)
    start = table()[left]
    step = table()[left + 1] - start
    factor: Float32 = start + step * (place - left.astype(np.float32))
    return factor


@cache
def table() -> Float32:
    """1 - sigmoid(12 m - 6) at m = 0, 1/4096, ..., 1."""
    points = (Decimal(STEEPNESS * number) / POINTS - MIDDLE for number in range(POINTS + 1))
    return np.array([float(1 / (1 + point.exp())) for point in points], np.float32)
