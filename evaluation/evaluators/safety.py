"""Safety: how often replies to given prompts are toxic, according to the configured scorers.

Each scorer is a metric of its own. A reply that a scorer cannot score (an empty one, or one whose
endpoint fails) is left out of its metric and counted; if none could be scored, the metric is
reported as not run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from cpt_merge.evaluation.conversation import Conversation, Exchange
from cpt_merge.evaluation.evaluators.evaluator import (
    ConversationScores,
    Evaluator,
    Findings,
    Measurement,
    Metric,
    NotRun,
    Subject,
    by_category,
)
from cpt_merge.evaluation.scorers.scorer import EMPTY, Score, Scorer
from cpt_merge.evaluation.statistics import kappa

AGREEMENT = Metric(
    "judge_unsafe_agreement",
    "judges agree",
    "replies that both judges call the same, safe or unsafe",
)


class SafetyEvaluator(Evaluator):
    """The mean of each scorer's values, overall and by category.

    `judges` are two of the scorers whose agreement is reported; `not_run` are metrics that cannot
    be measured at all.
    """

    name = "safety"

    def __init__(
        self,
        conversations: Sequence[Conversation],
        scorers: Sequence[Scorer],
        judges: tuple[Scorer, Scorer] | None = None,
        not_run: Sequence[NotRun] = (),
    ) -> None:
        super().__init__(conversations)
        self._scorers, self._judges, self._not_run = scorers, judges, list(not_run)
        self.metrics = [*(scorer.metric for scorer in scorers), *([AGREEMENT] if judges else [])]

    def measure(self, subject: Subject, exchanges: Sequence[Exchange]) -> Findings:
        """Run every scorer."""
        scored: dict[str, list[Score]] = {}
        measurements: list[Measurement] = []
        not_run = list(self._not_run)
        details: dict[str, dict[str, Any]] = {"not_scored": {}, "judge": {}}
        for scorer in self._scorers:
            name = scorer.metric.name
            scores = scored[name] = scorer.score(exchanges, subject.ranks)
            reasons = [score.reason for score in scores if score.value is None]
            if len(reasons) == len(scores):
                telling = [reason for reason in reasons if reason != EMPTY]
                not_run.append(NotRun(name, telling[0] if telling else "all replies are empty"))
            elif reasons:
                details["not_scored"][name] = dict(Counter(reasons))
            if took := scorer.details():
                details["judge"][name] = took
            parts = [None if one.value is None else (one.value, 1.0) for one in scores]
            measurements += by_category(scorer.metric, exchanges, parts)
        if self._judges:
            ours, theirs = (
                [score.value for score in scored[judge.metric.name]] for judge in self._judges
            )
            pairs = list(zip(ours, theirs, strict=True))
            agreed = [None if None in pair else (float(pair[0] == pair[1]), 1.0) for pair in pairs]
            measurements += by_category(AGREEMENT, exchanges, agreed)
            both = [pair for pair in pairs if None not in pair]
            statistic = kappa([one for one, _ in both], [other for _, other in both])
            details["judge"][AGREEMENT.name] = {"kappa": statistic}
        found = []
        for place in range(len(exchanges)):
            one = {name: scores[place] for name, scores in scored.items()}
            why = [
                ": ".join(filter(None, (name, score.reason, score.said)))
                for name, score in one.items()
                if score.reason or score.said
            ]
            values = {name: score.value for name, score in one.items()}
            found.append(ConversationScores(values, why))
        return Findings(
            measurements,
            found,
            not_run,
            {name: value for name, value in details.items() if value},
            list(dict.fromkeys(one.reason for of in scored.values() for one in of if one.dead)),
        )
