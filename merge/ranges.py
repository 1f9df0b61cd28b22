"""What must be known of a whole tensor before its first element is merged: TIES's thresholds, the gate's range.

The thresholds come from the vectors' files alone. The gate compares CPT with the base, and CPT may lie in pieces over
many processes: each gives the range of its own pieces, and `joined` makes one of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cpt_merge.checkpoint.dtypes import Float32
from cpt_merge.merge.align import Role, RowAlignment, RowPairs
from cpt_merge.merge.plan import MergePlan, PlannedTensor, PlannedVector, elements
from cpt_merge.merge.thinning import magnitude_threshold

STEP = 1 << 18  # elements read at a time


@dataclass
class TensorRange:
    """`thresholds`: for each vector the magnitude that TIES keeps from; `low` and `high`: of |cpt - base|."""

    thresholds: list[float]
    low: float = math.inf
    high: float = -math.inf


def needs_thresholds(plan: MergePlan, tensor: PlannedTensor) -> bool:
    """Whether TIES has to look at the tensor."""
    return (
        plan.config.method == "ties"
        and tensor.treatment is not None
        and tensor.treatment.action == "add"
    )


def needs_gate(tensor: PlannedTensor) -> bool:
    """Whether the gate has to."""
    return tensor.treatment is not None and tensor.treatment.gate


def thresholds(plan: MergePlan, tensor: PlannedTensor) -> list[float]:
    """For each vector the magnitude that the wanted share of its elements reaches."""
    density = plan.config.density
    if density is None or not needs_thresholds(plan, tensor):
        return []
    return [
        magnitude_threshold(lambda vector=vector: _vector_parts(tensor, vector), density)  # type: ignore[misc]
        for vector in plan.vectors
    ]


def _vector_parts(tensor: PlannedTensor, vector: PlannedVector) -> Iterator[Float32]:
    """All elements that the vector has of a tensor."""
    if tensor.by_token:
        for rows in shared_rows(vector.rows, tensor.spec.shape):
            yield vector.source.rows(tensor.name, rows).values
        return
    for start in range(0, elements(tensor), STEP):
        yield vector.source.elements(tensor.name, start, min(start + STEP, elements(tensor))).values


def shared_rows(alignment: RowAlignment, shape: tuple[int, ...]) -> Iterator[RowPairs]:
    """The rows that a vector shares with the output, some at a time."""
    shared = np.flatnonzero(alignment.role == Role.SHARED)
    step = max(STEP // math.prod(shape[1:]), 1)
    for start in range(0, len(shared), step):
        part = shared[start : start + step]
        yield RowPairs(alignment.base[part], alignment.chat[part])


def joined(parts: Iterable[dict[str, Any]]) -> dict[str, TensorRange]:
    """One range for each tensor, from those that several processes saved."""
    found: dict[str, TensorRange] = {}
    for part in parts:
        for name, values in part.items():
            here = found.setdefault(name, TensorRange([]))
            here.thresholds = values["thresholds"] or here.thresholds
            here.low, here.high = min(here.low, values["low"]), max(here.high, values["high"])
    return found


def as_json(ranges: dict[str, TensorRange]) -> dict[str, Any]:
    """The opposite of `joined`."""
    return {name: asdict(of_tensor) for name, of_tensor in ranges.items()}
