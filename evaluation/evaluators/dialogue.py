"""Dialogues of 2 to 5 turns, checked by program: later turns depend on earlier ones.

Each turn is answered after the model's own earlier replies and checked strictly, like an
instruction: was a fact recalled, a correction respected, "the second of your list" found? Turns
without checks only prepare the next ones.
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

TURNS = Metric("dialogue_turns", "turns", "checked turns with every check passed")
WHOLE = Metric("dialogues", "dialogues", "dialogues with every checked turn passed")


class DialogueEvaluator(Evaluator):
    """Shares of turns and of whole dialogues passed."""

    name = "dialogue"
    metrics = (TURNS, WHOLE)

    def measure(self, subject: Subject, exchanges: Sequence[Exchange]) -> Findings:
        """Both shares, and the share of turns by the number of the turn."""
        passed = [_turns_passed(exchange) for exchange in exchanges]
        turns = [(float(sum(found.values())), float(len(found))) for found in passed]
        whole = [(float(all(found.values())), 1.0) for found in passed]
        measurements = [
            *shares_of_exchanges(TURNS, exchanges, turns),
            *shares_of_exchanges(WHOLE, exchanges, whole),
        ]
        for turn in sorted({turn for found in passed for turn in found}):
            at_turn = [(float(found[turn]), 1.0) if turn in found else None for found in passed]
            measurements += shares_of_exchanges(TURNS, exchanges, at_turn, group=f"turn {turn + 1}")
        scores = [
            ConversationScores({TURNS.name: top / bottom, WHOLE.name: every}, failures(exchange))
            for exchange, (top, bottom), (every, _) in zip(exchanges, turns, whole, strict=True)
        ]
        return Findings(measurements, scores)


def _turns_passed(exchange: Exchange) -> dict[int, bool]:
    """For each turn with checks, whether the reply passes all of them."""
    return {
        place: all(check.passes(exchange.replies[place].text) for check in turn.checks)
        for place, turn in enumerate(exchange.conversation.turns)
        if turn.checks
    }


def failures(exchange: Exchange) -> list[str]:
    """A line for every failed check, with its turn."""
    turns = zip(exchange.conversation.turns, exchange.replies, strict=True)
    return [
        f"turn {number}: {check.failure(reply.text)}"
        for number, (turn, reply) in enumerate(turns, start=1)
        for check in turn.checks
        if not check.passes(reply.text)
    ]
