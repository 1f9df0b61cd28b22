"""What an evaluation found, and the metrics made of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.conversation import Exchange
from cpt_merge.evaluation.evaluators.evaluator import (
    Evaluator,
    Findings,
    Measurement,
    Metric,
    NotRun,
    unique,
)
from cpt_merge.evaluation.statistics import Estimate, PairedDifference, Parts, difference, estimate

Scores = dict[str, dict[str, dict[str, Estimate]]]  # model -> language -> metric
Breakdowns = dict[
    str, dict[str, dict[str, dict[str, Estimate]]]
]  # model -> language -> metric -> group
Differences = dict[
    str, dict[str, dict[str, PairedDifference]]
]  # model -> language -> metric; to the baseline


@dataclass(frozen=True)
class Sample:
    """A conversation, a model's replies, and what was found of them: by its own evaluator, and by those that read all."""

    evaluator: str
    exchange: Exchange
    scores: dict[str, float | None]
    why: list[str]


@dataclass(frozen=True)
class ModelResult:
    """Everything measured of one model."""

    name: str
    findings: list[Findings]
    samples: list[Sample]
    tokens_per_second: float  # of generation; 0 where nothing was asked

    @property
    def measured(self) -> list[Measurement]:
        """Of all evaluators."""
        return [part for findings in self.findings for part in findings.measured]

    @property
    def not_run(self) -> list[NotRun]:
        """What could not be had."""
        return [one for findings in self.findings for one in findings.not_run]

    @property
    def failed(self) -> list[str]:
        """What endpoints said that failed, each once."""
        return unique([reason for findings in self.findings for reason in findings.failed])

    def samples_of(self, evaluator: str) -> list[Sample]:
        """The conversations that a evaluator asked."""
        return [sample for sample in self.samples if sample.evaluator == evaluator]

    @property
    def details(self) -> dict[str, Any]:
        """What evaluators add to results.json; what two of them add under one name stands there together."""
        found: dict[str, Any] = {}
        for findings in self.findings:
            for name, value in findings.details.items():
                found[name] = {**found.get(name, {}), **value}
        return found


@dataclass(frozen=True)
class Results:
    """All models' metrics, side by side."""

    models: list[ModelResult]
    metrics: dict[str, Metric]  # all that the evaluators may report, in the order they are shown
    evaluators: dict[str, list[str]]  # the metrics of each evaluator
    scores: Scores
    breakdowns: Breakdowns
    differences: Differences
    baseline: str

    def flat(self) -> dict[str, float]:
        """`model/language/metric` -> value, four digits behind the point."""
        return {"/".join(names): round(one.value, 4) for *names, one in each(self.scores)}

    @property
    def failed(self) -> list[str]:
        """What endpoints said that failed, each once."""
        return unique([reason for result in self.models for reason in result.failed])

    def languages_with(self, metric: str) -> list[str]:
        """The languages that a metric was measured in, in order."""
        return languages_with(self.scores, metric)


def summarise(
    models: Sequence[ModelResult], evaluators: Sequence[Evaluator], baseline: str | None, seed: int
) -> Results:
    """Every metric of every model and language, with its interval and its difference to the baseline's.

    Raises `UserError` for a baseline that is no model of these.
    """
    names = [result.name for result in models]
    compared_to = choose_baseline(names, baseline)
    theirs = _parts(next(result for result in models if result.name == compared_to).measured)
    scores: Scores = {name: {} for name in names}
    breakdowns: Breakdowns = {name: {} for name in names}
    differences: Differences = {name: {} for name in names if name != compared_to}
    for result in models:
        for (language, metric, group), parts in _parts(result.measured).items():
            if group:
                by_group = breakdowns[result.name].setdefault(language, {}).setdefault(metric, {})
                by_group[group] = estimate(parts, seed)
                continue
            scores[result.name].setdefault(language, {})[metric] = estimate(parts, seed)
            found = difference(parts, theirs.get((language, metric, ""), {}), seed)
            if result.name != compared_to and found is not None:
                differences[result.name].setdefault(language, {})[metric] = found
    of_evaluators = {
        evaluator.name: [metric.name for metric in evaluator.metrics] for evaluator in evaluators
    }
    metrics = {metric.name: metric for evaluator in evaluators for metric in evaluator.metrics}
    for evaluator, findings in (
        pair for result in models for pair in zip(evaluators, result.findings, strict=False)
    ):
        for part in findings.measured:
            if (
                part.metric.name not in metrics
            ):  # those of lm-eval's tasks are known when they have run
                metrics[part.metric.name] = part.metric
                of_evaluators[evaluator.name].append(part.metric.name)
    return Results(
        list(models), metrics, of_evaluators, scores, breakdowns, differences, compared_to
    )


def choose_baseline(models: Sequence[str], wanted: str | None) -> str:
    """The model that the others are compared with: the one that was asked for, `base`, or the first."""
    if wanted is not None and wanted not in models:
        raise UserError(
            f"evaluation.baseline = {wanted} is none of the models; they are {', '.join(models)}."
        )
    return wanted or ("base" if "base" in models else models[0])


def _parts(measured: Sequence[Measurement]) -> dict[tuple[str, str, str], Parts]:
    return {(one.language, one.metric.name, one.group): one.parts for one in measured}


def each(nested: Mapping[str, Any]) -> Iterable[list[Any]]:
    """The leaves of nested mappings, each behind the names that lead to it."""
    for name, value in nested.items():
        if isinstance(value, dict):
            for rest in each(value):
                yield [name, *rest]
        else:
            yield [name, value]


def languages_with(scores: Scores, metric: str) -> list[str]:
    """The languages that a metric was measured in, in order."""
    return list(
        dict.fromkeys(
            language
            for model in scores.values()
            for language, found in model.items()
            if metric in found
        )
    )
