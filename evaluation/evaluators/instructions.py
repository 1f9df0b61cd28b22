"""Instruction following, checked by program in the manner of IFEval (Zhou et al., 2023).

    strict      the reply as it is
    loose       the best of eight readings, check by check: without the first line, the last one,
                both, and Markdown's asterisks, so that an introduction does no harm

The checks cover the form that was asked for, not whether the rest is true, sensible or helpful.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpt_merge.evaluation.checks.registry import Check
from cpt_merge.evaluation.conversation import Exchange
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
    """Whether one reply passes each of its checks, strictly and loosely."""

    checks: tuple[Check, ...]
    strict: list[bool]
    loose: list[bool]

    def parts(self) -> dict[Metric, tuple[float, float]]:
        """Each metric as (passed, all)."""
        number = float(len(self.checks))
        return {
            STRICT: (float(all(self.strict)), 1.0),
            CHECKS_STRICT: (float(sum(self.strict)), number),
            LOOSE: (float(all(self.loose)), 1.0),
            CHECKS_LOOSE: (float(sum(self.loose)), number),
        }


class InstructionsEvaluator(Evaluator):
    """Shares of prompts and of checks passed."""

    name = "instructions"
    metrics = (STRICT, CHECKS_STRICT, LOOSE, CHECKS_LOOSE)

    def measure(self, subject: Subject, exchanges: Sequence[Exchange]) -> Findings:
        """The four shares, and the strict share of checks by the check's name."""
        checked = [check_reply(exchange) for exchange in exchanges]
        measurements = []
        for metric in self.metrics:
            parts = [found.parts()[metric] for found in checked]
            measurements += shares_of_exchanges(metric, exchanges, parts)
        measurements += _by_check(exchanges, checked)
        scores = []
        for exchange, found in zip(exchanges, checked, strict=True):
            text, results = exchange.replies[0].text, zip(found.checks, found.strict, strict=True)
            failed = [check.failure(text) for check, passed in results if not passed]
            values = {metric.name: top / all_ for metric, (top, all_) in found.parts().items()}
            scores.append(ConversationScores(values, failed))
        return Findings(measurements, scores)


def check_reply(exchange: Exchange) -> CheckResults:
    """Run every check of a prompt."""
    checks, text = exchange.conversation.turns[0].checks, exchange.replies[0].text
    strict = [check.passes(text) for check in checks]
    return CheckResults(checks, strict, [check.passes_loosely(text) for check in checks])


def _by_check(exchanges: Sequence[Exchange], checked: Sequence[CheckResults]) -> list[Measurement]:
    measurements = []
    for name in sorted({check.name for found in checked for check in found.checks}):
        parts = []
        for found in checked:
            results = zip(found.checks, found.strict, strict=True)
            passed = [ok for check, ok in results if check.name == name]
            parts.append((float(sum(passed)), float(len(passed))))
        measurements += shares_of_exchanges(CHECKS_STRICT, exchanges, parts, group=name)
    return measurements
