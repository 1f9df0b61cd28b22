"""What an evaluation found: each model's measurements and replies, and the metrics of all models
side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpt_merge.evaluation.conversation import Exchange
from cpt_merge.evaluation.evaluators.evaluator import (
    ConversationScores,
    Findings,
    Measurement,
    Metric,
    NotRun,
)
from cpt_merge.evaluation.statistics import Estimate, PairedDifference

# model -> language -> metric (-> group); differences are those to the baseline
Scores = dict[str, dict[str, dict[str, Estimate]]]
Breakdowns = dict[str, dict[str, dict[str, dict[str, Estimate]]]]
Differences = dict[str, dict[str, dict[str, PairedDifference]]]


@dataclass(frozen=True)
class Sample:
    """A conversation with a model's replies, and what its own evaluator and those that read all
    found."""

    evaluator: str
    exchange: Exchange
    scores: dict[str, float | None]
    why: list[str]

    def add(self, found: ConversationScores) -> None:
        """Add what one more evaluator found."""
        self.scores.update(found.scores)
        self.why.extend(found.why)


@dataclass(frozen=True)
class ModelResult:
    """Everything that was measured of one model."""

    name: str
    findings: list[Findings]
    samples: list[Sample]
    tokens_per_second: float  # of generation; 0 if nothing was asked

    @property
    def measurements(self) -> list[Measurement]:
        """Those of all evaluators."""
        return [one for findings in self.findings for one in findings.measurements]

    @property
    def not_run(self) -> list[NotRun]:
        """The metrics without a value."""
        return [one for findings in self.findings for one in findings.not_run]

    @property
    def failed(self) -> list[str]:
        """The errors of endpoints, each once."""
        return list(dict.fromkeys(one for found in self.findings for one in found.failed))

    def samples_of(self, evaluator: str) -> list[Sample]:
        """The conversations of an evaluator."""
        return [sample for sample in self.samples if sample.evaluator == evaluator]

    @property
    def details(self) -> dict[str, Any]:
        """What evaluators add to results.json; entries of two evaluators under one name are
        joined."""
        found: dict[str, Any] = {}
        for findings in self.findings:
            for name, value in findings.details.items():
                found[name] = {**found.get(name, {}), **value}
        return found


@dataclass(frozen=True)
class Results:
    """The metrics of all models, side by side."""

    models: list[ModelResult]
    metrics: dict[str, Metric]  # all that evaluators may report, in the order of display
    evaluators: dict[str, list[str]]  # evaluator -> its metrics
    scores: Scores
    breakdowns: Breakdowns
    differences: Differences
    baseline: str

    def flat(self) -> dict[str, float]:
        """`model/language/metric` -> value with four decimals."""
        return {"/".join(names): round(one.value, 4) for *names, one in each(self.scores)}

    @property
    def failed(self) -> list[str]:
        """The errors of endpoints, each once."""
        return list(dict.fromkeys(reason for one in self.models for reason in one.failed))


def add_scores(samples: Sequence[Sample], findings: Findings) -> None:
    """Add what an evaluator found to the samples that it was given."""
    for sample, found in zip(samples, findings.scores, strict=bool(findings.scores)):
        sample.add(found)


def each(nested: Mapping[str, Any]) -> Iterator[list[Any]]:
    """The leaves of nested mappings, each after the names that lead to it."""
    for name, value in nested.items():
        if isinstance(value, dict):
            for rest in each(value):
                yield [name, *rest]
        else:
            yield [name, value]


def languages_with(scores: Scores, metric: str) -> list[str]:
    """The languages in which a metric was measured, in order."""
    found = (names for *names, _ in each(scores))
    return list(dict.fromkeys(language for _, language, name in found if name == metric))
