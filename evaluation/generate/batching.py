"""Batches are formed before processes divide them, so padding does not depend on the world size."""

from __future__ import annotations

from collections.abc import Sequence


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of items of similar length, `size` per batch, the longest first.

    If a batch does not fit into memory, the first one fails.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return [order[start : start + size] for start in range(0, len(order), size)]
