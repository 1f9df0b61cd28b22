"""How long the chat vector and CPT's own change are, and how far they point the same way; summed while streaming.

From these lengths follows whether `base` is the ancestor of both models, and whether CPT holds the vector already.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cpt_merge.checkpoint.dtypes import Float32, widen
from cpt_merge.checkpoint.tensor_kinds import kind_of, layer_of
from cpt_merge.core.artifact import write_json
from cpt_merge.merge.plan import MergePlan

_FILES = "statistics-*.json"
SAMPLE = 1 << 16  # elements of each tensor, from its middle

UNRELATED = 1.0  # |model - base| / |base|; about 1.4 for models that have nothing in common, below 0.3 for siblings
BODY = ("attention", "mlp", "other")
CONTAINED = 0.5  # times the vector; about 1 if CPT started from the chat model, about 0 if it started from base


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


def sample(plan: MergePlan) -> list[Statistics]:
    """Statistics of a small part of every tensor, for each vector, read in a moment."""
    statistics: list[Statistics] = [{} for _ in plan.vectors]
    for tensor in plan.tensors:
        if tensor.by_token or tensor.treatment is None:
            continue
        size = plan.cpt.tensors[tensor.name].size
        start = max((size - SAMPLE) // 2, 0)
        stop = min(start + SAMPLE, size)
        cpt = widen(
            plan.cpt.read_flat(tensor.name, start, stop), plan.cpt.tensors[tensor.name].dtype
        )
        for vector, of_vector in zip(plan.vectors, statistics, strict=True):
            difference = vector.source.elements(tensor.name, start, stop)
            of_vector[tensor.name] = Sums()
            of_vector[tensor.name].count(cpt, difference.base, difference.values)
    return statistics


def warnings(plan: MergePlan, statistics: list[Statistics]) -> list[str]:
    """One sentence for each thing that is probably wrong with the choice of models."""
    found = []
    for vector, of_vector in zip(plan.vectors, statistics, strict=True):
        prefix = "" if vector is plan.chat else f"{vector.label}: "
        found += [prefix + warning for warning in _warnings(of_vector)] if of_vector else []
    return found


def _warnings(statistics: Statistics) -> list[str]:
    """Of one vector. Only the matrices of the layers count: any training moves the vocabulary's rows and the norms in
    like ways, so these lie along the vector even in a model that never saw it.
    """
    sums = total(sums for name, sums in statistics.items() if kind_of(name) in BODY)
    found = []
    if total(statistics.values()).vector == 0:
        found.append("chat equals base: there is no vector to add; check the two models.")
    if sums.vector_share > UNRELATED:
        found.append(
            f"|chat - base| is {sums.vector_share:.2f} of |base|: base is probably not chat's ancestor."
        )
    if sums.change_share > UNRELATED:
        found.append(
            f"|cpt - base| is {sums.change_share:.2f} of |base|: base is probably not the CPT model's ancestor."
        )
    elif sums.contained > CONTAINED:
        found.append(
            f"cpt holds {sums.contained:.2f} times the chat vector already (cosine {sums.cosine:.2f}): "
            "it was probably trained from the chat model, and would get the vector twice."
        )
    return found
