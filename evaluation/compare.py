"""All models side by side: intervals, differences to the baseline, and what compares replies with
the baseline's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.evaluators.evaluator import Evaluator, Measurement, Metric
from cpt_merge.evaluation.results import (
    Breakdowns,
    Differences,
    ModelResult,
    Results,
    Scores,
    add_scores,
    each,
)
from cpt_merge.evaluation.statistics import (
    COVERAGE,
    PairedDifference,
    Parts,
    corrected,
    difference,
    estimate,
)


def choose_baseline(models: Sequence[str], wanted: str | None) -> str:
    """The model that the others are compared with: the wanted one, `base`, or the first.

    Raises `UserError` if the wanted one is not among the models.
    """
    if wanted is not None and wanted not in models:
        raise UserError(
            f"evaluation.baseline = {wanted} is none of the models; they are {', '.join(models)}."
        )
    return wanted or ("base" if "base" in models else models[0])


def compare_replies(
    results: Sequence[ModelResult], evaluators: Sequence[Evaluator], baseline: str, ranks: Ranks
) -> list[ModelResult]:
    """The results, with what evaluators find when they compare a model's replies with the
    baseline's."""
    theirs = next(result for result in results if result.name == baseline)
    return [
        result if result is theirs else _compared(result, theirs, evaluators, ranks)
        for result in results
    ]


def _compared(
    result: ModelResult, baseline: ModelResult, evaluators: Sequence[Evaluator], ranks: Ranks
) -> ModelResult:
    findings = list(result.findings)
    for evaluator in evaluators:
        samples = result.samples_of(evaluator.name)
        ours = [one.exchange for one in samples]
        theirs = [one.exchange for one in baseline.samples_of(evaluator.name)]
        found = evaluator.compare(ranks, ours, theirs)
        if found is not None:
            findings.append(found)
            add_scores(samples, found)
    return replace(result, findings=findings)


def summarise(
    models: Sequence[ModelResult],
    evaluators: Mapping[str, Sequence[Metric]],
    baseline: str | None,
    seed: int,
) -> Results:
    """Every metric of every model and language, with interval and difference to the baseline.

    `evaluators` are those that measured the models, with what they may report. Raises `UserError`
    for a baseline that is not among the models.
    """
    metrics, of_evaluators = _metrics(models, evaluators)
    names = [result.name for result in models]
    compared_to = choose_baseline(names, baseline)
    theirs = _parts(next(result for result in models if result.name == compared_to).measurements)
    scores: Scores = {name: {} for name in names}
    breakdowns: Breakdowns = {name: {} for name in names}
    differences: Differences = {name: {} for name in names if name != compared_to}
    for result in models:
        for (language, metric, group), parts in _parts(result.measurements).items():
            share = metrics[metric].share
            if group:
                of_language = breakdowns[result.name].setdefault(language, {})
                of_language.setdefault(metric, {})[group] = estimate(parts, share)
                continue
            scores[result.name].setdefault(language, {})[metric] = estimate(parts, share)
            found = difference(parts, theirs.get((language, metric, ""), {}), seed, share)
            if result.name != compared_to and found is not None:
                differences[result.name].setdefault(language, {})[metric] = found
    return Results(
        list(models), metrics, of_evaluators, scores, breakdowns, _starred(differences), compared_to
    )


def metrics_by_evaluator(evaluators: Sequence[Evaluator]) -> dict[str, Sequence[Metric]]:
    """What each evaluator may report."""
    return {one.name: one.metrics for one in evaluators}


def _metrics(
    models: Sequence[ModelResult], evaluators: Mapping[str, Sequence[Metric]]
) -> tuple[dict[str, Metric], dict[str, list[str]]]:
    """All metrics, and the names of each evaluator's."""
    metrics = {metric.name: metric for own in evaluators.values() for metric in own}
    of_evaluators = {name: [metric.name for metric in own] for name, own in evaluators.items()}
    for result in models:  # the metrics of lm-eval's tasks are known when these have run
        for evaluator, findings in zip(evaluators, result.findings, strict=False):
            for one in findings.measurements:
                if one.metric.name not in metrics:
                    metrics[one.metric.name] = one.metric
                    of_evaluators[evaluator].append(one.metric.name)
    return metrics, of_evaluators


def _starred(differences: Differences) -> Differences:
    """The differences, with those that remain after Holm's correction marked as `beyond`."""
    found: list[tuple[str, str, str, PairedDifference]] = [
        (model, language, metric, one) for (model, language, metric, one) in each(differences)
    ]
    chances = corrected([one.p for *_, one in found])
    starred: Differences = {model: {} for model in differences}
    for (model, language, metric, one), chance in zip(found, chances, strict=True):
        beyond = chance < 1 - COVERAGE
        starred[model].setdefault(language, {})[metric] = replace(one, beyond=beyond)
    return starred


def _parts(measurements: Sequence[Measurement]) -> dict[tuple[str, str, str], Parts]:
    return {(one.language, one.metric.name, one.group): one.parts for one in measurements}
