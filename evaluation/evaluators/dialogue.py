"""Dialogue of several turns, without a judge: later turns need what earlier ones said.

Each turn is answered with the model's own earlier replies before it, and checked like an
instruction (strictly). A fact that was recalled, a correction that was heeded, "the second of your
list": what can be seen by words. Needs dialogues of 2 to 5 turns; turns without checks only lead
on.
"""

from __future__ import annotations

from collections.abc import Sequence

from cpt_merge.evaluation.conversation import Conversation, Exchange
from cpt_merge.evaluation.evaluators.evaluator import (
    ConversationScores,
    Evaluator,
    Findings,
    Metric,
    Subject,
    shares_of_exchanges,
)

TURNS = Metric("dialogue_turns", "turns", "checked turns with every check passed")
WHOLE = Metric("dialogues", "dialogues", "dialogues with every checked turn passed")


class DialogueEvaluator(Evaluator):
    """Shares of turns and of whole dialogues passed."""

    name = "dialogue"
    metrics = (TURNS, WHOLE)

    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self._conversations = list(conversations)

    def conversations(self) -> list[Conversation]:
        """The dialogues."""
        return self._conversations

    def measure(self, subject: Subject, exchanges: Sequence[Exchange]) -> Findings:
        """Both shares, and that of turns by the number of the turn."""
        passed = [turns_passed(exchange) for exchange in exchanges]
        turns = [(float(sum(found.values())), float(len(found))) for found in passed]
        whole = [(float(all(found.values())), 1.0) for found in passed]
        measured = shares_of_exchanges(TURNS, exchanges, turns) + shares_of_exchanges(
            WHOLE, exchanges, whole
        )
        for turn in sorted({turn for found in passed for turn in found}):
            at_turn = [(float(found[turn]), 1.0) if turn in found else None for found in passed]
            measured += shares_of_exchanges(TURNS, exchanges, at_turn, group=f"turn {turn + 1}")
        verdicts = [
            ConversationScores(
                {TURNS.name: top / bottom, WHOLE.name: all_passed}, failures(exchange)
            )
            for exchange, (top, bottom), (all_passed, _) in zip(
                exchanges, turns, whole, strict=True
            )
        ]
        return Findings(measured, verdicts)


def turns_passed(exchange: Exchange) -> dict[int, bool]:
    """Of the turns that are checked, whether the reply passes every check."""
    return {
        place: all(check.passes(exchange.replies[place].text) for check in turn.checks)
        for place, turn in enumerate(exchange.conversation.turns)
        if turn.checks
    }


def failures(exchange: Exchange) -> list[str]:
    """A line for every check that failed, with its turn."""
    return [
        f"turn {place + 1}: {check.failure(reply.text)}"
        for place, (turn, reply) in enumerate(
            zip(exchange.conversation.turns, exchange.replies, strict=True)
        )
        for check in turn.checks
        if not check.passes(reply.text)
    ]
