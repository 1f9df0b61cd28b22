"""Instruction following: prompts whose demands a program can check, in the manner of IFEval (Zhou et al., 2023).

    strict      the reply as it is
    loose       the best of eight readings of it, check by check: without the first line, the last, both, and Markdown's
                stars, which forgives an introduction

Needs single prompts with checks. The checks see the form that was asked for, and nothing of whether the rest is true,
sensible or helpful.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpt_merge.evaluation.checks.registry import Check
from cpt_merge.evaluation.conversation import Conversation, Exchange
from cpt_merge.evaluation.evaluators.evaluator import (
    ConversationScores,
    Evaluator,
    Findings,
    Measurement,
    Metric,
    Subject,
    shares_of_exchanges,
)

STRICT = Metric("instructions", "prompts", "prompts with every check passed")
CHECKS_STRICT = Metric("instruction_checks", "checks", "checks passed")
LOOSE = Metric(
    "instructions_loose",
    "prompts, loosely",
    "prompts with every check passed in one of the loose readings",
)
CHECKS_LOOSE = Metric(
    "instruction_checks_loose", "checks, loosely", "checks passed in one of the loose readings"
)


@dataclass(frozen=True)
class CheckResults:
    """One reply's checks: passed or not, strictly and loosely."""

    checks: tuple[Check, ...]
    strict: list[bool]
    loose: list[bool]


class InstructionsEvaluator(Evaluator):
    """Shares of prompts and of checks passed."""

    name = "instructions"
    metrics = (STRICT, CHECKS_STRICT, LOOSE, CHECKS_LOOSE)

    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self._conversations = list(conversations)

    def conversations(self) -> list[Conversation]:
        """The prompts with their checks."""
        return self._conversations

    def measure(self, subject: Subject, exchanges: Sequence[Exchange]) -> Findings:
        """The four shares, and the strict share of checks by the check's name."""
        checked = [check_reply(exchange) for exchange in exchanges]
        values = {
            STRICT: [(float(all(found.strict)), 1.0) for found in checked],
            CHECKS_STRICT: [
                (float(sum(found.strict)), float(len(found.strict))) for found in checked
            ],
            LOOSE: [(float(all(found.loose)), 1.0) for found in checked],
            CHECKS_LOOSE: [(float(sum(found.loose)), float(len(found.loose))) for found in checked],
        }
        measured = [
            part
            for metric in values
            for part in shares_of_exchanges(metric, exchanges, values[metric])
        ]
        return Findings(
            [*measured, *_by_check(exchanges, checked)],
            [_verdict(exchange, found) for exchange, found in zip(exchanges, checked, strict=True)],
        )


def check_reply(exchange: Exchange) -> CheckResults:
    """Every check of a prompt."""
    checks, text = exchange.conversation.turns[0].checks, exchange.replies[0].text
    return CheckResults(
        checks, [one.passes(text) for one in checks], [one.passes_loosely(text) for one in checks]
    )


def _verdict(exchange: Exchange, found: CheckResults) -> ConversationScores:
    scores = {
        STRICT.name: float(all(found.strict)),
        CHECKS_STRICT.name: sum(found.strict) / len(found.strict),
        LOOSE.name: float(all(found.loose)),
        CHECKS_LOOSE.name: sum(found.loose) / len(found.loose),
    }
    text = exchange.replies[0].text
    failed = [
        one.failure(text)
        for one, passed in zip(found.checks, found.strict, strict=True)
        if not passed
    ]
    return ConversationScores(scores, failed)


def _by_check(exchanges: Sequence[Exchange], checked: Sequence[CheckResults]) -> list[Measurement]:
    names = sorted({check.name for found in checked for check in found.checks})
    measured = []
    for name in names:
        parts = []
        for found in checked:
            passed = [
                ok for one, ok in zip(found.checks, found.strict, strict=True) if one.name == name
            ]
            parts.append((float(sum(passed)), float(len(passed))))
        measured += shares_of_exchanges(CHECKS_STRICT, exchanges, parts, group=name)
    return measured
