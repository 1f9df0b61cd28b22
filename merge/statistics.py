"""How long the chat vector and CPT's own change are, and how far they point the same way; summed while streaming."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cpt_merge.checkpoint.dtypes import Float32
from cpt_merge.checkpoint.tensor_kinds import kind_of, layer_of
from cpt_merge.core.artifact import write_json

_FILES = "statistics-*.json"


@dataclass
class Sums:
    """Sums over elements: base², vector² (chat - base), change² (cpt - base), vector * change."""

    base: float = 0.0
    vector: float = 0.0
    change: float = 0.0
    dot: float = 0.0

    def count(self, cpt: Float32, base: Float32 | None, vector: Float32) -> None:
        """Add the sums of one chunk. Without the base, only the vector's."""
        v = vector.reshape(-1)
        self.vector += float(np.dot(v, v))
        if base is None:
            return
        b, c = base.reshape(-1), (cpt - base).reshape(-1)
        self.base += float(np.dot(b, b))
        self.change += float(np.dot(c, c))
        self.dot += float(np.dot(v, c))

    @property
    def finite(self) -> bool:
        """False where one of the elements was NaN or Inf (or beyond any sane size)."""
        return math.isfinite(self.base + self.vector + self.change)

    def __iadd__(self, other: Sums) -> Sums:
        self.base += other.base
        self.vector += other.vector
        self.change += other.change
        self.dot += other.dot
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
        return (
            self.dot / math.sqrt(self.vector * self.change) if self.vector and self.change else 0.0
        )

    @property
    def contained(self) -> float:
        """How many times the vector lies in cpt already: its coefficient in the projection of cpt - base."""
        return self.dot / self.vector if self.vector else 0.0


Statistics = dict[str, Sums]  # tensor -> sums, of one vector


def total(parts: Iterable[Sums]) -> Sums:
    """The sum of several."""
    result = Sums()
    for part in parts:
        result += part
    return result


def by_layer(statistics: Statistics) -> dict[str, Sums]:
    """`embed`, the layers in order, then what lies outside them."""
    layers = sorted({layer for name in statistics if (layer := layer_of(name)) is not None})
    groups = ["embed", *[str(layer) for layer in layers], "norm", "head", "other"]
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


def save(statistics: list[Statistics], directory: Path, rank: int) -> None:
    """Leave one process's part for `collect`: the statistics of every vector."""
    values = [{name: asdict(sums) for name, sums in of_vector.items()} for of_vector in statistics]
    write_json(directory / f"statistics-{rank:05d}.json", values)


def collect(directory: Path, vectors: int) -> list[Statistics]:
    """The sum of what all processes saved; removes their files."""
    statistics: list[Statistics] = [{} for _ in range(vectors)]
    for file in sorted(directory.glob(_FILES)):
        for of_vector, values in zip(statistics, json.loads(file.read_text()), strict=True):
            for name, sums in values.items():
                of_vector.setdefault(name, Sums())
                of_vector[name] += Sums(**sums)
        file.unlink()
    return statistics
