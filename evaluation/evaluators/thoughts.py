"""Whether a reasoning model thinks, and whether it comes to an end.

All other metrics see the answer alone. A reply that ends within a thought has no answer, so it
fails everything else.
"""

from __future__ import annotations

from collections.abc import Sequence

from cpt_merge.evaluation.conversation import Exchange
from cpt_merge.evaluation.evaluators.evaluator import (
    ConversationScores,
    Evaluator,
    Findings,
    Metric,
    Subject,
    shares_of_exchanges,
)

THINKS = Metric("thinks", "thinks", "replies that begin with thoughts")
ENDLESS = Metric(
    "endless_thought",
    "never answers",
    "replies that end within a thought, so they have no answer",
    rising=False,
)
TOKENS = Metric(
    "thought_tokens",
    "thought tokens",
    "tokens of the thoughts of a reply that thinks, the mean",
    rising=False,
    share=False,
)


class ThoughtsEvaluator(Evaluator):
    """The thoughts of every reply, of models that may have any."""

    name = "thoughts"
    metrics = (THINKS, ENDLESS, TOKENS)
    reads_all = True

    def measure(self, subject: Subject, exchanges: Sequence[Exchange]) -> Findings:
        """Both shares, and the mean length."""
        if subject.template is None or subject.template.thoughts is None:
            return Findings([])
        measurements = []
        for metric, parts in (
            (THINKS, [_share(exchange, "thinks") for exchange in exchanges]),
            (ENDLESS, [_share(exchange, "within_thought") for exchange in exchanges]),
            (TOKENS, [_tokens(exchange) for exchange in exchanges]),
        ):
            measurements += shares_of_exchanges(metric, exchanges, parts)
        return Findings(measurements, [_scores(exchange) for exchange in exchanges])


def _share(exchange: Exchange, what: str) -> tuple[float, float]:
    return float(sum(getattr(one, what) for one in exchange.replies)), float(len(exchange.replies))


def _tokens(exchange: Exchange) -> tuple[float, float]:
    thinking = [one.thought_tokens for one in exchange.replies if one.thinks]
    return float(sum(thinking)), float(len(thinking))


def _scores(exchange: Exchange) -> ConversationScores:
    why = [
        f"turn {turn}: no answer, since the reply ended within a thought after "
        f"{reply.thought_tokens} tokens"
        for turn, reply in enumerate(exchange.replies, start=1)
        if reply.within_thought
    ]
    tokens, thinking = _tokens(exchange)
    turns = len(exchange.replies)
    values = {
        THINKS.name: thinking / turns,
        ENDLESS.name: len(why) / turns,
        TOKENS.name: tokens / thinking if thinking else None,
    }
    return ConversationScores(values, why)
