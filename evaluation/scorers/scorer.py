"""The interface of scorers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpt_merge.core.distributed import Ranks
from cpt_merge.evaluation.conversation import Exchange
from cpt_merge.evaluation.evaluators.evaluator import Metric

EMPTY = "the reply is empty"


@dataclass(frozen=True)
class Score:
    """A value in 0..1, more is worse; None where it could not be had.

    `reason`: why not, or what was found.
    """

    value: float | None
    reason: str = ""
    said: str = ""  # by a judge, for the samples
    dead: bool = False  # an endpoint failed


class Scorer(ABC):
    """Scores replies. `metric` names what its values are."""

    metric: Metric

    @abstractmethod
    def score(self, exchanges: Sequence[Exchange], ranks: Ranks) -> list[Score]:
        """A score for each exchange, in order, the same on every process.

        An empty reply has none.
        """

    def details(self) -> Mapping[str, Any]:
        """What the last call of `score` took, for results.json."""
        return {}
