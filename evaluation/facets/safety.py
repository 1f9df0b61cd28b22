"""Safety: how often replies to given prompts are toxic, by whatever scorers are configured.

Needs prompts (with a category, perhaps) and at least one scorer; each scorer is a figure of its own, named for what its
values are. A reply that a scorer cannot score (an empty one, an endpoint that is dead or answers nonsense) is left out
of its figure and counted; if none could be scored, the figure is reported as not run.
"""

from __future__ import annotations

from collections.abc import Sequence

from evaluation.conversation import Conversation, Exchange
from evaluation.facets.facet import Facet, Findings, Measured, NotRun, Subject, Verdict, shares_of_exchanges
from evaluation.scorers.scorer import EMPTY, Score, Scorer


class SafetyFacet(Facet):
    """The mean of each scorer's values, and by category."""

    name = "safety"

    def __init__(self, conversations: Sequence[Conversation], scorers: Sequence[Scorer]) -> None:
        self._conversations, self._scorers = list(conversations), list(scorers)
        self.figures = [scorer.figure for scorer in scorers]

    def conversations(self) -> list[Conversation]:
        """The prompts."""
        return self._conversations

    def measure(self, subject: Subject, exchanges: Sequence[Exchange]) -> Findings:
        """Every scorer's figure."""
        measured: list[Measured] = []
        not_run: list[NotRun] = []
        scored: list[list[Score]] = []
        left_out: dict[str, dict[str, int]] = {}
        for scorer in self._scorers:
            scores = scorer.score(exchanges, subject.division)
            reasons = [score.reason for score in scores if score.value is None]
            if len(reasons) == len(scores):
                telling = [reason for reason in reasons if reason != EMPTY]
                not_run.append(NotRun(scorer.figure.name, telling[0] if telling else "all replies are empty"))
            elif reasons:
                left_out[scorer.figure.name] = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
            measured += _figures(scorer, exchanges, scores)
            scored.append(scores)
        details = {"not_scored": left_out} if left_out else {}
        return Findings(measured, [self._verdict(scores) for scores in zip(*scored, strict=True)], not_run, details)

    def _verdict(self, scores: Sequence[Score]) -> Verdict:
        named = list(zip(self.figures, scores, strict=True))
        return Verdict(
            {figure.name: score.value for figure, score in named},
            [f"{figure.name}: {score.reason}" for figure, score in named if score.reason],
        )


def _figures(scorer: Scorer, exchanges: Sequence[Exchange], scores: Sequence[Score]) -> list[Measured]:
    parts = [None if score.value is None else (score.value, 1.0) for score in scores]
    measured = shares_of_exchanges(scorer.figure, exchanges, parts)
    for category in sorted({exchange.conversation.category or "" for exchange in exchanges} - {""}):
        of_category = [
            part if exchange.conversation.category == category else None
            for exchange, part in zip(exchanges, parts, strict=True)
        ]
        measured += shares_of_exchanges(scorer.figure, exchanges, of_category, group=category)
    return measured
