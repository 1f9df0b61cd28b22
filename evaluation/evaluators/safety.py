"""Safety: how often replies to given prompts are toxic, by whatever scorers are conmetricd.

Needs prompts (with a category, perhaps) and at least one scorer; each scorer is a metric of its
own, named for what its values are. A reply that a scorer cannot score (an empty one, an endpoint
that is dead or answers nonsense) is left out of its metric and counted; if none could be scored,
the metric is reported as not run.
"""

from __future__ import annotations

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
    unique,
)
from cpt_merge.evaluation.judge.agreement import kappa
from cpt_merge.evaluation.scorers.scorer import EMPTY, Score, Scorer

AGREEMENT = Metric(
    "judge_unsafe_agreement",
    "judges agree",
    "replies that both judges call the same, safe or unsafe",
)


class SafetyEvaluator(Evaluator):
    """The mean of each scorer's values, and by category.

    `judges` are two scorers of the same replies, whose agreement is reported; `not_run` is what was
    asked for and cannot be had at all.
    """

    name = "safety"

    def __init__(
        self,
        conversations: Sequence[Conversation],
        scorers: Sequence[Scorer],
        judges: tuple[Scorer, Scorer] | None = None,
        not_run: Sequence[NotRun] = (),
    ) -> None:
        self._conversations, self._scorers, self._judges = (
            list(conversations),
            list(scorers),
            judges,
        )
        self._not_run = list(not_run)
        self.metrics = [*(scorer.metric for scorer in scorers), *([AGREEMENT] if judges else [])]

    def conversations(self) -> list[Conversation]:
        """The prompts."""
        return self._conversations

    def measure(self, subject: Subject, exchanges: Sequence[Exchange]) -> Findings:
        """Every scorer's metric."""
        scored = {
            scorer.metric.name: scorer.score(exchanges, subject.ranks) for scorer in self._scorers
        }
        measured: list[Measurement] = []
        not_run = list(self._not_run)
        details: dict[str, dict[str, Any]] = {"not_scored": {}, "judge": {}}
        for scorer in self._scorers:
            name, scores = scorer.metric.name, scored[scorer.metric.name]
            reasons = [score.reason for score in scores if score.value is None]
            if len(reasons) == len(scores):
                telling = [reason for reason in reasons if reason != EMPTY]
                not_run.append(NotRun(name, telling[0] if telling else "all replies are empty"))
            elif reasons:
                details["not_scored"][name] = {
                    reason: reasons.count(reason) for reason in dict.fromkeys(reasons)
                }
            if took := scorer.details():
                details["judge"][name] = took
            measured += by_category(scorer.metric, exchanges, [_pair(score) for score in scores])
        if self._judges:
            ours, theirs = (scored[scorer.metric.name] for scorer in self._judges)
            measured += by_category(
                AGREEMENT, exchanges, [_equal(*pair) for pair in zip(ours, theirs, strict=True)]
            )
            both = [
                (one.value, other.value)
                for one, other in zip(ours, theirs, strict=True)
                if _equal(one, other)
            ]
            details["judge"][AGREEMENT.name] = {
                "kappa": kappa([one for one, _ in both], [other for _, other in both])
            }
        verdicts = [self._verdict(scores) for scores in zip(*scored.values(), strict=True)]
        failed = [score.reason for scores in scored.values() for score in scores if score.dead]
        return Findings(
            measured,
            verdicts,
            not_run,
            {name: value for name, value in details.items() if value},
            unique(failed),
        )

    def _verdict(self, scores: Sequence[Score]) -> ConversationScores:
        named = list(zip((scorer.metric.name for scorer in self._scorers), scores, strict=True))
        why = [
            ": ".join(part for part in (name, score.reason, score.said) if part)
            for name, score in named
        ]
        told = [line for line, score in zip(why, scores, strict=True) if score.reason or score.said]
        return ConversationScores({name: score.value for name, score in named}, told)


def _pair(score: Score) -> tuple[float, float] | None:
    return None if score.value is None else (score.value, 1.0)


def _equal(one: Score, other: Score) -> tuple[float, float] | None:
    return (
        None if one.value is None or other.value is None else (float(one.value == other.value), 1.0)
    )
