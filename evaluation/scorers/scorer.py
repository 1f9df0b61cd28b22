"""The interface of scorers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cpt_merge.core.distributed import Ranks
from cpt_merge.evaluation.conversation import Exchange
from cpt_merge.evaluation.evaluators.evaluator import Metric

EMPTY = "the reply is empty"


@dataclass(frozen=True)
class Score:
    """A value from 0 to 1, higher is worse, or None; `reason` says why, or what was found."""

    value: float | None
    reason: str = ""
    said: str = ""  # a judge's answer, for the samples
    dead: bool = False  # an endpoint failed
    attributes: Mapping[str, float] = field(default_factory=dict)  # other values from 0 to 1


class Scorer(ABC):
    """Scores replies; `metric` describes the values."""

    metric: Metric

    @abstractmethod
    def score(self, exchanges: Sequence[Exchange], ranks: Ranks) -> list[Score]:
        """A score for each exchange, in order, on every process. An empty reply has no value."""

    def details(self) -> Mapping[str, Any]:
        """What the last call of `score` cost, for results.json."""
        return {}
