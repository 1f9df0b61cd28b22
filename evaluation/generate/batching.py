"""Batches that are formed before the work is divided over processes, so that padding never depends on their number."""

from __future__ import annotations

from collections.abc import Sequence


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places of items of like length, `size` to a batch.

    The longest come first: what does not fit fails at once.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return [order[start : start + size] for start in range(0, len(order), size)]
