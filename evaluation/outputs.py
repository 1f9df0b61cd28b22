"""What an evaluation leaves: results.json, samples.jsonl, figures, and tables in the tracker."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import write_json, write_json_lines
from cpt_merge.core.redaction import without_secrets
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.evaluators.form import METRICS as FORM
from cpt_merge.evaluation.evaluators.language import BITS
from cpt_merge.evaluation.figures import PANELS, draw_bits_per_byte, draw_shares, figures_for
from cpt_merge.evaluation.results import Results, each, languages_with
from cpt_merge.evaluation.tables import not_scored, show
from cpt_merge.tracking import Cell, Tracker

INTERVAL = ["value", "low", "high", "n"]
FAILED = "failed"  # in results.json: the errors of endpoints
COUNTS = (
    "requests", "cached", "prompt_tokens", "completion_tokens", "requests_without_token_counts",
)  # fmt: skip


def report(
    config: EvaluationConfig,
    models: Mapping[str, Path],
    results: Results,
    out: Path,
    tracker: Tracker,
) -> None:
    """Write, track and print everything."""
    write_and_track(config, models, results, out, tracker)
    show(results, judges_took(results), config.samples_shown)


def write_and_track(
    config: EvaluationConfig,
    models: Mapping[str, Path],
    results: Results,
    out: Path,
    tracker: Tracker,
) -> None:
    """Write results.json, samples.jsonl and the figures, and send everything to the tracker."""
    write_json(out / "results.json", _results_content(config, models, results))
    write_json_lines(out / "samples.jsonl", sample_rows(results))
    track(results, draw(results, out), tracker)
    tracker.file("evaluation-results.json", out / "results.json")


def is_complete(results: Path) -> bool:
    """Whether results.json exists and no endpoint failed.

    After a failure, the same command asks again for what is missing.
    """
    return results.is_file() and not json.loads(results.read_text(encoding="utf-8")).get(FAILED)


def draw(results: Results, out: Path) -> dict[str, Path]:
    """Draw the figures that there are metrics for; those of an earlier evaluation are removed."""
    scores, drawn = results.scores, {}
    for name in (BITS, *PANELS):
        (out / f"{name}.png").unlink(missing_ok=True)
    for name in figures_for([one for one in results.metrics if languages_with(scores, one)]):
        path = out / f"{name}.png"
        if name in PANELS:
            drawn[name] = draw_shares(scores, PANELS[name], path)
        else:
            drawn[name] = draw_bits_per_byte(scores, path)
    return drawn


def _results_content(
    config: EvaluationConfig, models: Mapping[str, Path], results: Results
) -> dict[str, Any]:
    """results.json: every metric with its interval and n, details, and the settings."""
    return {
        "config": without_secrets(config.model_dump()),
        "baseline": results.baseline,
        "judges": judges_took(results),
        FAILED: results.failed,
        "metrics": {name: metric.meaning for name, metric in results.metrics.items()},
        "models": {
            result.name: {
                "directory": str(models[result.name]),
                "generated_tokens_per_second": round(result.tokens_per_second, 2),
                **result.details,
                "scores": _as_json(results.scores[result.name]),
                "breakdowns": _as_json(results.breakdowns[result.name]),
                "differences": _as_json(results.differences.get(result.name, {})),
                "not_run": {one.metric: one.reason for one in result.not_run},
            }
            for result in results.models
        },
    }


def _as_json(value: Any) -> Any:
    """Nested mappings of estimates as JSON."""
    if isinstance(value, dict):
        return {name: _as_json(inner) for name, inner in value.items()}
    return asdict(value)


def sample_rows(results: Results) -> Iterator[dict[str, Any]]:
    """The lines of samples.jsonl, one per model and conversation."""
    for result in results.models:
        for sample in result.samples:
            conversation, replies = sample.exchange.conversation, sample.exchange.replies
            scores = sample.scores.items()
            yield {
                "model": result.name,
                "evaluator": sample.evaluator,
                "language": conversation.language,
                **({"category": conversation.category} if conversation.category else {}),
                "messages": sample.exchange.messages(),
                "reply": replies[-1].text,
                "replies": [asdict(reply) for reply in replies],
                "checks": [
                    [{"name": check.name, **check.arguments} for check in turn.checks]
                    for turn in conversation.turns
                ],
                "scores": {
                    name: None if value is None else round(value, 4) for name, value in scores
                },
                "why": sample.why,
            }


def track(results: Results, drawn: Mapping[str, Path], tracker: Tracker) -> None:
    """Send the metrics, the tables and the figures to the tracker."""
    values = {f"eval/{name}": value for name, value in results.flat().items()}
    speeds = {
        f"eval/{result.name}/tokens_per_second": result.tokens_per_second
        for result in results.models
        if result.samples
    }
    tracker.log({**values, **speeds})
    took = judges_took(results)
    tracker.summary({**values, **({"eval/judges": took} if took else {})})
    names = ["model", "language", "metric"]
    changes = [*names, f"minus {results.baseline}", *INTERVAL[1:], "p", "beyond"]
    for table, columns, nested in (
        ("scores", [*names, *INTERVAL], results.scores),
        ("breakdowns", [*names, "of", *INTERVAL], results.breakdowns),
        ("differences", changes, results.differences),
    ):
        rows = [[*path, *asdict(one).values()] for *path, one in each(nested)]
        if rows:
            tracker.table(f"eval/{table}", columns, rows)
    described: list[list[Cell]] = [
        [evaluator, name, metric.heading, metric.meaning, metric.rising, metric.share]
        for evaluator, of_evaluator in results.evaluators.items()
        for name, metric in ((name, results.metrics[name]) for name in of_evaluator)
    ]
    columns = ["evaluator", "metric", "heading", "meaning", "more is better", "share"]
    tracker.table("eval/metrics", columns, described)
    not_run: list[list[Cell]] = [
        [result.name, one.metric, one.reason]
        for result in results.models
        for one in (*result.not_run, *not_scored(result))
    ]
    if not_run:
        tracker.table("eval/not_run", ["model", "metric", "reason"], not_run)
    _track_samples(results, tracker)
    for name, path in drawn.items():
        tracker.image(f"eval/{name}", path)


def _track_samples(results: Results, tracker: Tracker) -> None:
    form = [metric.name for metric in FORM]
    others = [name for name in results.metrics if name not in form and name != BITS]
    others = [name for name in others if name not in results.evaluators.get("thoughts", [])]
    thinks = any(one.exchange.thought for result in results.models for one in result.samples)
    rows: list[list[Cell]] = []
    for result in results.models:
        for sample in result.samples:
            exchange, scores = sample.exchange, sample.scores
            rows.append([
                exchange.conversation.language, exchange.conversation.questions, result.name,
                *([exchange.thought] if thinks else []), exchange.text,
                sum(reply.tokens for reply in exchange.replies),
                *map(scores.get, form), sample.evaluator, *map(scores.get, others),
                "\n".join(sample.why),
            ])  # fmt: skip
    thought = ["thought"] if thinks else []
    first = ["language", "prompt", "model", *thought, "reply", "tokens"]
    if rows:
        tracker.table("eval/samples", [*first, *form, "evaluator", *others, "why"], rows)


def judges_took(results: Results) -> dict[str, dict[str, float]]:
    """Requests, tokens and cost of each judge, for all models and metrics together.

    There is no cost if a part of it is unknown.
    """
    took: dict[str, list[Mapping[str, Any]]] = {}
    for result in results.models:
        for one in result.details.get("judge", {}).values():
            if "model" in one:
                took.setdefault(one["model"], []).append(one)
    totals = {}
    for model, parts in took.items():
        known = [name for name in COUNTS if any(name in one for one in parts)]
        if all("cost" in one for one in parts):
            known.append("cost")
        totals[model] = {name: sum(one.get(name, 0) for one in parts) for name in known}
    return totals
