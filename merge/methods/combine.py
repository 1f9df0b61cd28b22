"""Combine corresponding elements of CPT and of the vectors by the recipe's method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cpt_merge.checkpoint.dtypes import Float32
from cpt_merge.merge import formula
from cpt_merge.merge.config import MergeConfig
from cpt_merge.merge.methods.dare import draw_kept, keep_drawn
from cpt_merge.merge.methods.slerp import Products, slerp
from cpt_merge.merge.methods.ties import elected_mean, keep_largest
from cpt_merge.merge.rules import Treatment


@dataclass
class TensorRange:
    """What must be known of a whole tensor before its first element is merged."""

    thresholds: list[float]  # TIES: for each vector the magnitude from which elements are kept
    low: float = math.inf  # gate: the least and the greatest |cpt - base|
    high: float = -math.inf
    products: Products | None = None  # slerp


@dataclass(frozen=True)
class Place:
    """Elements [start, start + count) of a tensor, or only their rows that `rows` selects."""

    tensor: str
    start: int
    count: int
    rows: NDArray[np.bool_] | None = None

    def select(self, drawn: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """What was drawn for all of [start, start + count), for the selected rows."""
        return drawn if self.rows is None else drawn.reshape(len(self.rows), -1)[self.rows]


def combine(
    config: MergeConfig,
    treatment: Treatment,
    place: Place,
    cpt: Float32,
    vectors: Sequence[Float32],
    gate: Float32 | None,
    whole: TensorRange | None,
) -> Float32:
    """Thin, gate, scale, join: elements of the merged tensor, not yet rounded; all of one shape.

    `gate` holds the factors of `methods/gate.py`, `whole` what is known of the whole tensor. For
    slerp, `vectors` has the chat model's own elements.
    """
    if config.method == "slerp":
        assert whole is not None, f"{place.tensor} was not looked at"
        assert whole.products is not None, f"{place.tensor} has no angle"
        return slerp(cpt, vectors[0], treatment.ratios[0], whole.products)
    if config.method in ("add", "interpolate") and gate is None:
        return _sum(cpt, vectors, treatment.ratios)
    thinned = [_thin(config, number, place, d, whole) for number, d in enumerate(vectors)]
    if gate is not None:
        thinned = [d * gate for d in thinned]
    if config.method in ("add", "dare"):
        return _sum(cpt, thinned, treatment.ratios)
    scaled = [d * np.float32(ratio) for d, ratio in zip(thinned, treatment.ratios, strict=True)]
    merged: Float32 = cpt + elected_mean(scaled)
    return merged


def _sum(cpt: Float32, vectors: Sequence[Float32], ratios: Sequence[float]) -> Float32:
    merged = cpt
    for d, ratio in zip(vectors, ratios, strict=True):
        merged = formula.add(merged, d, ratio)
    return merged


def _thin(
    config: MergeConfig, number: int, place: Place, d: Float32, whole: TensorRange | None
) -> Float32:
    if config.method == "ties":
        assert whole is not None, f"{place.tensor} has no threshold"
        return keep_largest(d, whole.thresholds[number])
    if config.method in ("dare", "dare_ties"):
        assert config.density is not None, "the configuration requires a density"
        stream = f"{config.seed}/{number}/{place.tensor}"
        kept = place.select(draw_kept(config.density, stream, place.start, place.count))
        return keep_drawn(d, kept.reshape(d.shape), config.density)
    return d
