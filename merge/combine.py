"""What the recipe's method makes of corresponding elements of CPT and of the vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cpt_merge.checkpoint.dtypes import Float32
from cpt_merge.merge import formula as kernel
from cpt_merge.merge import gate
from cpt_merge.merge.config import MergeConfig
from cpt_merge.merge.election import elected_mean
from cpt_merge.merge.ranges import TensorRange
from cpt_merge.merge.rules import Treatment
from cpt_merge.merge.thinning import draw_kept, keep_drawn, keep_largest


@dataclass(frozen=True)
class Place:
    """Which elements of a tensor: [start, start + count), or of these the rows that `rows` selects."""

    tensor: str
    start: int
    count: int
    rows: NDArray[np.bool_] | None = None

    def select(self, drawn: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """What was drawn for all of [start, start + count), for the selected ones."""
        return drawn if self.rows is None else drawn.reshape(len(self.rows), -1)[self.rows]


def combine(
    config: MergeConfig,
    treatment: Treatment,
    place: Place,
    cpt: Float32,
    vectors: Sequence[Float32],
    factor: Float32 | None,
    whole: TensorRange | None,
) -> Float32:
    """Thin, gate, scale, join: the elements of the merged tensor, not yet rounded. All arrays have one shape.

    `factor` is the gate's, `whole` what is known of the whole tensor.
    """
    if config.method == "add" and factor is None:
        return _sum(cpt, vectors, treatment.ratios)
    thinned = [_thin(config, number, place, d, whole) for number, d in enumerate(vectors)]
    if factor is not None:
        thinned = [d * factor for d in thinned]
    if config.method in ("add", "dare"):
        return _sum(cpt, thinned, treatment.ratios)
    scaled = [d * np.float32(ratio) for d, ratio in zip(thinned, treatment.ratios, strict=True)]
    merged: Float32 = cpt + elected_mean(scaled)
    return merged


def gate_factor(cpt: Float32, base: Float32 | None, whole: TensorRange | None) -> Float32:
    """The gate of some elements. The plan sees to it that base and range are there."""
    assert base is not None and whole is not None, "a gate without base or range"  # noqa: PT018
    return gate.gate(gate.moved(cpt, base), whole.low, whole.high)


def _sum(cpt: Float32, vectors: Sequence[Float32], ratios: Sequence[float]) -> Float32:
    merged = cpt
    for d, ratio in zip(vectors, ratios, strict=True):
        merged = kernel.add(merged, d, ratio)
    return merged


def _thin(
    config: MergeConfig, number: int, place: Place, d: Float32, whole: TensorRange | None
) -> Float32:
    if config.method == "ties":
        assert whole is not None, f"{place.tensor} has no threshold"
        return keep_largest(d, whole.thresholds[number])
    if config.method in ("dare", "dare_ties"):
        assert config.density is not None, "the configuration sees to a density"
        stream = f"{config.seed}/{number}/{place.tensor}"
        kept = place.select(draw_kept(config.density, stream, place.start, place.count))
        return keep_drawn(d, kept.reshape(d.shape), config.density)
    return d
