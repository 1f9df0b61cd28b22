"""How long the chat vector and CPT's own change are, and how far they point the same way.

The sums are taken while the merge streams, by default of one element in sixteen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cpt_merge.checkpoint.dtypes import Float32
from cpt_merge.checkpoint.tensor_kinds import OTHER_MODALITIES, kind_of, layer_of

# The sample of a merge: the first WINDOW of every PERIOD elements of a tensor, so that it depends
# neither on chunks nor on shards
WINDOW, PERIOD = 1 << 14, 1 << 18


@dataclass
class Sums:
    """Sums over elements: base², vector² (chat - base), change² (cpt - base), vector * change.

    `counted` of `elements` elements are in the sums.
    """

    base: float = 0.0
    vector: float = 0.0
    change: float = 0.0
    dot: float = 0.0
    counted: int = 0
    elements: int = 0

    def count(self, cpt: Float32, base: Float32 | None, vector: Float32) -> None:
        """Add the sums of some elements. Without the base, only the vector's."""
        v = vector.reshape(-1)
        self.vector += float(np.dot(v, v))
        self.counted += v.size
        if base is None:
            return
        b, c = base.reshape(-1), (cpt - base).reshape(-1)
        self.base += float(np.dot(b, b))
        self.change += float(np.dot(c, c))
        self.dot += float(np.dot(v, c))

    def scaled(self) -> Sums:
        """The sums of all elements, as far as the counted ones tell."""
        scale = self.elements / self.counted if self.counted else 0.0
        return Sums(
            self.base * scale,
            self.vector * scale,
            self.change * scale,
            self.dot * scale,
            self.elements,
            self.elements,
        )

    def __iadd__(self, other: Sums) -> Sums:
        self.base += other.base
        self.vector += other.vector
        self.change += other.change
        self.dot += other.dot
        self.counted += other.counted
        self.elements += other.elements
        return self

    @property
    def vector_share(self) -> float:
        """|chat - base| / |base|."""
        return math.sqrt(self.vector / self.base) if self.base else 0.0

    @property
    def change_share(self) -> float:
        """|cpt - base| / |base|."""
        return math.sqrt(self.change / self.base) if self.base else 0.0

    @property
    def cosine(self) -> float:
        """Between chat - base and cpt - base."""
        squared = self.vector * self.change
        return self.dot / math.sqrt(squared) if self.vector and self.change else 0.0

    @property
    def contained(self) -> float:
        """How many times CPT contains the vector: the projection of cpt - base on it."""
        return self.dot / self.vector if self.vector else 0.0


Statistics = dict[str, Sums]  # tensor -> sums, of one vector


def total(parts: Iterable[Sums]) -> Sums:
    """The sum over several tensors."""
    result = Sums()
    for part in parts:
        result += part.scaled()
    return result


def windows(start: int, count: int) -> list[slice]:
    """Where the sampled elements are among `count` elements of a tensor from `start` on."""
    firsts = range(start - start % PERIOD, start + count, PERIOD)
    bounds = [(max(first - start, 0), min(first + WINDOW - start, count)) for first in firsts]
    return [slice(first, last) for first, last in bounds if first < last]


def sampled_rows(rows: NDArray[np.int64], width: int) -> NDArray[np.bool_]:
    """Which rows of a matrix are in the sample: those that begin in a window."""
    found: NDArray[np.bool_] = rows * width % PERIOD < WINDOW
    return found


def add_sums(statistics: Sequence[Statistics], tensor: str, sums: Iterable[Sums]) -> None:
    """Add the sums of some elements of a tensor, one for each vector."""
    for of_vector, of_elements in zip(statistics, sums, strict=True):
        of_vector.setdefault(tensor, Sums())
        of_vector[tensor] += of_elements


def total_of_ranks(parts: Sequence[Sequence[Statistics]]) -> list[Statistics]:
    """The sums of all ranks, added in the order of the ranks."""
    statistics: list[Statistics] = [{} for _ in parts[0]]
    for part in parts:
        for tensor in part[0]:
            add_sums(statistics, tensor, [of_vector[tensor] for of_vector in part])
    return statistics


def by_layer(statistics: Statistics) -> dict[str, Sums]:
    """`embed`, the layers in order, then the tensors outside the layers."""
    layers = sorted({layer for name in statistics if (layer := layer_of(name)) is not None})
    groups = ["embed", *[str(layer) for layer in layers], "norm", "head", *OTHER_MODALITIES]
    groups.append("other")
    found = {
        group: total(sums for name, sums in statistics.items() if _group(name) == group)
        for group in groups
    }
    return {group: sums for group, sums in found.items() if sums.base}


def by_kind(statistics: Statistics) -> dict[str, Sums]:
    """Module kind -> sums."""
    kinds = dict.fromkeys(kind_of(name) for name in statistics)
    return {
        kind: total(sums for name, sums in statistics.items() if kind_of(name) == kind)
        for kind in kinds
    }


def _group(name: str) -> str:
    layer = layer_of(name)
    return kind_of(name) if layer is None else str(layer)
