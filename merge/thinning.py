"""Thin a vector: keep its largest elements (TIES), or a random choice of them (DARE).

Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023.
Yu et al., Language Models are Super Mario (DARE), ICML 2024.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from cpt_merge.checkpoint.dtypes import Float32

_PER_COUNTER = 8  # 32-bit numbers that Philox makes of one counter


def keep_largest(d: Float32, threshold: float) -> Float32:
    """Elements of at least the threshold's magnitude, the others 0."""
    kept: Float32 = np.where(np.abs(d) >= np.float32(threshold), d, np.float32(0))
    return kept


def magnitude_threshold(parts: Callable[[], Iterable[Float32]], density: float) -> float:
    """The magnitude that the largest int(density * n) elements, at least one, reach.

    Exact, in two passes, without holding the elements. `parts` reads them anew at each call. Non-negative floats are
    ordered as their bits, so the first pass counts by the upper half of the bits and the second one, within the half
    in question, by the lower. With equal magnitudes at the threshold a few more elements reach it: which of them to
    drop would depend on the order.
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
    """The highest bin down to which at least `wanted` elements lie, and how many lie above it."""
    from_above = counts[::-1].cumsum()
    place = int(np.searchsorted(from_above, wanted))
    return len(counts) - 1 - place, int(from_above[place - 1]) if place else 0


def draw_kept(density: float, stream: str, start: int, count: int) -> NDArray[np.bool_]:
    """Which of the elements [start, start + count) are kept: a function of their places and the stream alone.

    Philox is counter-based (Salmon et al., SC 2011), so any part can be drawn without what lies before it.
    """
    first = start // _PER_COUNTER
    counters = math.ceil((start + count) / _PER_COUNTER) - first
    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:16], "little")
    raw = np.random.Philox(key=key, counter=first).random_raw(counters * _PER_COUNTER // 2)
    numbers = np.asarray(raw, "<u8").view("<u4")[start - first * _PER_COUNTER :][:count]
    kept: NDArray[np.bool_] = numbers < np.uint64(math.ceil(density * 2**32))
    return kept


def keep_drawn(d: Float32, kept: NDArray[np.bool_], density: float) -> Float32:
    """d / density where kept, else 0: the expected vector stays the same."""
    thinned: Float32 = np.where(kept, d / np.float32(density), np.float32(0))
    return thinned
