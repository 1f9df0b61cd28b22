"""DARE: keep a random share of a vector's elements, enlarged to the same expected vector.

Yu et al., Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free
Lunch, ICML 2024.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

from cpt_merge.checkpoint.dtypes import Float32

_PER_COUNTER = 8  # 32-bit numbers that Philox makes from one counter


def draw_kept(density: float, stream: str, start: int, count: int) -> NDArray[np.bool_]:
    """Which of the elements [start, start + count) are kept: a function of places and stream.

    Philox is counter-based (Salmon et al., SC 2011), so any part can be drawn without the parts
    before it.
    """
    first = start // _PER_COUNTER
    counters = math.ceil((start + count) / _PER_COUNTER) - first
    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:16], "little")
    raw = np.random.Philox(key=key, counter=first).random_raw(counters * _PER_COUNTER // 2)
    numbers = np.asarray(raw, "<u8").view("<u4")[start - first * _PER_COUNTER :][:count]
    kept: NDArray[np.bool_] = numbers < np.uint64(math.ceil(density * 2**32))
    return kept


def keep_drawn(d: Float32, kept: NDArray[np.bool_], density: float) -> Float32:
    """d / density where kept, else 0."""
    thinned: Float32 = np.where(kept, d / np.float32(density), np.float32(0))
    return thinned
