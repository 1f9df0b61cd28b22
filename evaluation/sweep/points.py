"""The points of a sweep: a merge and what was measured of it.

Each is kept on disk as soon as it is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from cpt_merge.core.artifact import KeptLines
from cpt_merge.evaluation.statistics import Estimate
from cpt_merge.merge.config import MergeConfig, RuleConfig

EVERYTHING = "all"  # the one kind of a point that has one ratio


@dataclass(frozen=True)
class Point:
    """One merge. `ratios`: of every kind that has its own, or the one of `all`."""

    key: str  # digest of all that its figures depend on
    ratios: dict[str, float]
    figures: dict[str, dict[str, Estimate]]  # language -> figure
    merge_seconds: float  # adding the vector to the model in memory
    evaluation_seconds: float
    judges: dict[str, dict[str, float]] = field(
        default_factory=dict
    )  # requests, tokens and cost of each
    not_scored: dict[str, dict[str, int]] = field(
        default_factory=dict
    )  # figure -> why something was left out -> times

    @property
    def ratio(self) -> float | None:
        """The one ratio of all kinds; None for a point of the search."""
        return self.ratios.get(EVERYTHING)

    @property
    def name(self) -> str:
        """For tables and log lines."""
        return name_of(self.ratios)

    def mean(self, figure: str, languages: Sequence[str]) -> float | None:
        """A figure's mean over those of the languages that it was measured in; None if there is none."""
        values = [
            self.figures[one][figure].value
            for one in languages
            if figure in self.figures.get(one, {})
        ]
        return sum(values) / len(values) if values else None


def name_of(ratios: Mapping[str, float]) -> str:
    """`0.7`, or `attention 0.7 mlp 0.9`."""
    if set(ratios) == {EVERYTHING}:
        return f"{ratios[EVERYTHING]:g}"
    return " ".join(f"{kind} {ratio:g}" for kind, ratio in ratios.items())


def merge_config(
    recipe: MergeConfig, ratios: Mapping[str, float], per_layer: float | str | None
) -> MergeConfig:
    """The recipe's merge at other ratios.

    Its own rules go first, as exceptions; a ratio of a kind is a rule behind.
    """

    def shaped(ratio: float) -> float | str:
        return ratio if per_layer is None else f"{ratio!r} * ({per_layer})"

    if EVERYTHING in ratios:
        changes: dict[str, Any] = {"ratio": shaped(ratios[EVERYTHING])}
    else:
        of_kinds = [
            RuleConfig.model_validate({"kinds": [kind], "ratio": shaped(r)})
            for kind, r in ratios.items()
        ]
        changes = {"rules": [*recipe.rules, *of_kinds]}
    return recipe.model_copy(update=changes)


class KeptPoints:
    """points.jsonl: every point that is measured, one on a line."""

    def __init__(self, folder: Path) -> None:
        self._kept = KeptLines(folder / "points.jsonl")

    def read(self) -> dict[str, Point]:
        """All points by key."""
        return {
            key: POINT.validate_python({"key": key, **row})
            for key, row in self._kept.read().items()
        }

    def add(self, point: Point) -> None:
        """Keep a point."""
        row = asdict(point)
        self._kept.add(row.pop("key"), row)


POINT = TypeAdapter(Point)
