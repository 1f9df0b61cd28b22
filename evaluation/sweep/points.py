"""The points of a sweep: a merge and what was measured of it. Each is kept when it is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from cpt_merge.core.artifact import KeptLines
from cpt_merge.evaluation.statistics import Estimate
from cpt_merge.merge.config import MergeConfig, RuleConfig

EVERYTHING = "all"  # the only kind of a point with one ratio


@dataclass(frozen=True)
class Point:
    """One merge. `ratios` are by kind of module, or the one of `all`."""

    key: str  # digest of all that its metrics depend on
    ratios: dict[str, float]
    metrics: dict[str, dict[str, Estimate]]  # language -> metric
    merge_seconds: float  # for adding the vector to the model in memory
    evaluation_seconds: float
    judges: dict[str, dict[str, float]] = field(default_factory=dict)  # requests, tokens, cost
    not_scored: dict[str, dict[str, int]] = field(default_factory=dict)  # metric -> reason -> times

    @property
    def ratio(self) -> float | None:
        """The one ratio of all kinds; None for a point of the search."""
        return self.ratios.get(EVERYTHING)

    @property
    def name(self) -> str:
        """For tables and log lines."""
        return name_of(self.ratios)

    def mean(self, metric: str, languages: Sequence[str]) -> float | None:
        """A metric's mean over the languages in which it was measured; None if there are none."""
        found = [self.metrics[one] for one in languages if metric in self.metrics.get(one, {})]
        values = [of_language[metric].value for of_language in found]
        return sum(values) / len(values) if values else None


POINT = TypeAdapter(Point)


def name_of(ratios: Mapping[str, float]) -> str:
    """`0.7`, or `attention 0.7 mlp 0.9`."""
    if set(ratios) == {EVERYTHING}:
        return f"{ratios[EVERYTHING]:g}"
    return " ".join(f"{kind} {ratio:g}" for kind, ratio in ratios.items())


def merge_config(
    recipe: MergeConfig, ratios: Mapping[str, float], per_layer: float | str | None
) -> MergeConfig:
    """The recipe's merge at other ratios. Ratios of kinds are rules after the recipe's own."""

    def shaped(ratio: float) -> float | str:
        return ratio if per_layer is None else f"{ratio!r} * ({per_layer})"

    if EVERYTHING in ratios:
        return recipe.model_copy(update={"ratio": shaped(ratios[EVERYTHING])})
    of_kinds = [
        RuleConfig.model_validate({"kinds": [kind], "ratio": shaped(ratio)})
        for kind, ratio in ratios.items()
    ]
    return recipe.model_copy(update={"rules": [*recipe.rules, *of_kinds]})


class KeptPoints:
    """points.jsonl: every measured point, one per line."""

    def __init__(self, folder: Path) -> None:
        self._kept = KeptLines(folder / "points.jsonl")

    def read(self) -> dict[str, Point]:
        """All points by key."""
        rows = self._kept.read().items()
        return {key: POINT.validate_python({"key": key, **row}) for key, row in rows}

    def add(self, point: Point) -> None:
        """Keep a point."""
        row: dict[str, Any] = asdict(point)
        self._kept.add(row.pop("key"), row)
