"""What an evaluation leaves: results.json, samples.jsonl, metrics, tables on the terminal, the tracker's rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cpt_merge.core.artifact import write_json, write_json_lines
from cpt_merge.core.languages import find_language
from cpt_merge.core.progress import console, say
from cpt_merge.evaluation.config import EvaluationConfig
from cpt_merge.evaluation.conversation import Exchange
from cpt_merge.evaluation.evaluators.evaluator import Metric, NotRun
from cpt_merge.evaluation.evaluators.form import METRICS as FORM
from cpt_merge.evaluation.evaluators.language import BITS
from cpt_merge.evaluation.figures import PANELS, draw_bits_per_byte, draw_shares, figures_for
from cpt_merge.evaluation.results import ModelResult, Results, Sample, each, languages_with
from cpt_merge.evaluation.statistics import Estimate, PairedDifference
from cpt_merge.tracking import Cell, Tracker

SHOWN_CHARACTERS = 400  # of a sample's reply on the terminal
SHOWN_GROUPS = 8  # of a breakdown on the terminal; results.json has all
INTERVAL = ["value", "low", "high", "n"]
FAILED = "failed"  # of results.json: what endpoints said that failed


def report(
    config: EvaluationConfig,
    models: Mapping[str, Path],
    results: Results,
    out: Path,
    tracker: Tracker,
) -> None:
    """Write and show everything."""
    write_json(out / "results.json", results_content(config, models, results))
    write_json_lines(out / "samples.jsonl", sample_rows(results))
    track(results, draw(results, out), tracker)
    tracker.file("evaluation-results.json", out / "results.json")
    show_scores(results)
    show_breakdowns(results)
    show_not_run(results)
    show_left_out(results)
    show_judges(results)
    show_samples(results.models, config.samples_shown)


def is_complete(results: Path) -> bool:
    """Whether results.json is there, and no endpoint failed: what one left out is asked again by the same command."""
    return results.is_file() and not json.loads(results.read_text(encoding="utf-8")).get(FAILED)


def draw(results: Results, out: Path) -> dict[str, Path]:
    """The pictures that there are metrics for."""
    scores, drawn = results.scores, {}
    for name in (BITS, *PANELS):
        (out / f"{name}.png").unlink(missing_ok=True)  # of an earlier evaluation
    for name in figures_for(
        [metric for metric in results.metrics if languages_with(results.scores, metric)]
    ):
        path = out / f"{name}.png"
        drawn[name] = (
            draw_shares(scores, PANELS[name], path)
            if name in PANELS
            else draw_bits_per_byte(scores, path)
        )
    return drawn


def results_content(
    config: EvaluationConfig, models: Mapping[str, Path], results: Results
) -> dict[str, Any]:
    """results.json: every metric with its interval and n, what it rests on, and the settings that made it."""
    return {
        "config": config.model_dump(),
        "baseline": results.baseline,
        "judges": judges_took(results),
        FAILED: results.failed,
        "metrics": {name: metric.meaning for name, metric in results.metrics.items()},
        "models": {
            result.name: {
                "directory": str(models[result.name]),
                "generated_tokens_per_second": round(result.tokens_per_second, 2),
                **result.details,
                "scores": _plain(results.scores[result.name]),
                "breakdowns": _plain(results.breakdowns[result.name]),
                "differences": _plain(results.differences.get(result.name, {})),
                "not_run": {one.metric: one.reason for one in result.not_run},
            }
            for result in results.models
        },
    }


def _plain(value: Any) -> Any:
    """Nested mappings of estimates as JSON."""
    return (
        {name: _plain(inner) for name, inner in value.items()}
        if isinstance(value, dict)
        else asdict(value)
    )


def sample_rows(results: Results) -> Iterator[dict[str, Any]]:
    """samples.jsonl: one row per model and conversation."""
    for result in results.models:
        for sample in result.samples:
            conversation, replies = sample.exchange.conversation, sample.exchange.replies
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
                "scores": {name: _rounded(value) for name, value in sample.scores.items()},
                "why": sample.why,
            }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def track(results: Results, drawn: Mapping[str, Path], tracker: Tracker) -> None:
    """Send the metrics, the tables and the images."""
    values = {f"eval/{name}": value for name, value in results.flat().items()}
    speeds = {
        f"eval/{result.name}/tokens_per_second": result.tokens_per_second
        for result in results.models
        if result.samples
    }
    tracker.log({**values, **speeds})
    took = judges_took(results)
    tracker.summary({**values, **({"eval/judges": took} if took else {})})
    _table(tracker, "eval/scores", ["model", "language", "metric", *INTERVAL], results.scores)
    _table(
        tracker,
        "eval/breakdowns",
        ["model", "language", "metric", "of", *INTERVAL],
        results.breakdowns,
    )
    columns = ["model", "language", "metric", f"minus {results.baseline}", *INTERVAL[1:], "beyond"]
    _table(tracker, "eval/differences", columns, results.differences)
    meanings: list[list[Cell]] = [
        [evaluator, name, results.metrics[name].heading, results.metrics[name].meaning, results.metrics[name].rising,
         results.metrics[name].share]
        for evaluator, names in results.evaluators.items() for name in names
    ]  # fmt: skip
    tracker.table(
        "eval/metrics",
        ["evaluator", "metric", "heading", "meaning", "more is better", "share"],
        meanings,
    )
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


def _table(tracker: Tracker, name: str, columns: list[str], nested: Mapping[str, Any]) -> None:
    rows: list[list[Cell]] = [[*names, *asdict(one).values()] for *names, one in each(nested)]
    if rows:
        tracker.table(name, columns, rows)


def _track_samples(results: Results, tracker: Tracker) -> None:
    form = [metric.name for metric in FORM]
    others = [name for name in results.metrics if name not in form and name != BITS]
    columns = ["language", "prompt", "model", "reply", "tokens", *form, "evaluator", *others, "why"]
    rows: list[list[Cell]] = [
        [sample.exchange.conversation.language, sample.exchange.conversation.questions, result.name,
         sample.exchange.text, sum(reply.tokens for reply in sample.exchange.replies),
         *(sample.scores.get(name) for name in form), sample.evaluator, *(sample.scores.get(name) for name in others),
         "\n".join(sample.why)]
        for result in results.models for sample in result.samples
    ]  # fmt: skip
    if rows:
        tracker.table("eval/samples", columns, rows)


def show_scores(results: Results) -> None:
    """One table per language and evaluator: models down, metrics across, each over its interval and its difference."""
    languages = dict.fromkeys(language for found in results.scores.values() for language in found)
    for language in languages:
        for evaluator, names in results.evaluators.items():
            metrics = [
                results.metrics[name]
                for name in names
                if language in languages_with(results.scores, name)
            ]
            if metrics:
                console.print(_score_table(results, language, evaluator, metrics))
    if results.differences:
        console.print(
            Text(
                "below each value: its 95 % interval (bootstrap), and the difference to "
                f"{results.baseline}, with * where the interval of the paired difference does not hold 0",
                style="dim",
            )
        )


def _score_table(results: Results, language: str, evaluator: str, metrics: list[Metric]) -> Table:
    found_of = [
        found.get(language, {}).get(metric.name)
        for found in results.scores.values()
        for metric in metrics
    ]
    counts = [estimate.n for estimate in found_of if estimate]
    units = {"language": "documents", "knowledge": "questions"}.get(evaluator, "conversations")
    title = f"{find_language(language).name}, {evaluator}: {max(counts)} {units}"
    table = Table(
        "model",
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1),
    )
    for metric in metrics:
        table.add_column(metric.heading, justify="right")
    for model, found in results.scores.items():
        of_model = results.differences.get(model, {}).get(language, {})
        cells = [
            _cell(metric, found.get(language, {}).get(metric.name), of_model.get(metric.name))
            for metric in metrics
        ]
        table.add_row(model, *cells)
    return table


def _cell(metric: Metric, estimate: Estimate | None, difference: PairedDifference | None) -> Text:
    if estimate is None:
        return Text("–", style="dim")
    if metric.share:
        text = Text.assemble(
            f"{estimate.value:.0%}\n", (f"{100 * estimate.low:.0f}–{estimate.high:.0%}", "dim")
        )
        change = f"{100 * difference.value:+.0f}" if difference else ""
    else:
        text = Text.assemble(
            f"{estimate.value:.3f}\n", (f"{estimate.low:.3f}–{estimate.high:.3f}", "dim")
        )
        change = f"{difference.value:+.3f}" if difference else ""
    if difference:
        text.append(
            f"\n{change}{'*' if difference.beyond else ''}", "bold" if difference.beyond else "dim"
        )
    return text


def show_breakdowns(results: Results) -> None:
    """Parts of metrics (turns, categories): a table per language and metric, models across.

    Long ones are not shown.
    """
    seen = dict.fromkeys((names[1], names[2]) for *names, _ in each(results.breakdowns))
    for language, metric in seen:
        of_models = {
            model: found.get(language, {}).get(metric, {})
            for model, found in results.breakdowns.items()
        }
        groups = list(dict.fromkeys(group for found in of_models.values() for group in found))
        if len(groups) > SHOWN_GROUPS:
            continue
        title = f"{find_language(language).name}: {results.metrics[metric].meaning}, by kind"
        table = Table(
            "",
            "n",
            *of_models,
            title=title,
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
        )
        for group in groups:
            estimates = [found.get(group) for found in of_models.values()]
            n = max(estimate.n for estimate in estimates if estimate)
            table.add_row(
                Text(group),
                str(n),
                *(_plainly(results.metrics[metric], estimate) for estimate in estimates),
            )
        console.print(table)


def _plainly(metric: Metric, estimate: Estimate | None) -> str:
    return (
        "–"
        if estimate is None
        else f"{estimate.value:.0%}"
        if metric.share
        else f"{estimate.value:.2f}"
    )


def not_scored(result: ModelResult) -> list[NotRun]:
    """What was left out of a model's metrics."""
    return [
        NotRun(metric, f"{count} left out: {reason}")
        for metric, reasons in result.details.get("not_scored", {}).items()
        for reason, count in reasons.items()
    ]


def show_not_run(results: Results) -> None:
    """What could not be had, and why."""
    models: dict[NotRun, list[str]] = {}
    for result in results.models:
        for one in result.not_run:
            models.setdefault(one, []).append(result.name)
    for one, names in models.items():
        say(f"{', '.join(names)}: {one.metric} was not run: {one.reason}")
    for reason in results.failed:
        say(
            f"evaluation: {reason}; what is missing for it is asked again when the same command is run again"
        )


def show_left_out(results: Results) -> None:
    """What was left out of a metric, and why."""
    for result in results.models:
        for one in not_scored(result):
            say(f"{result.name}: {one.metric}: {one.reason}")


def judges_took(results: Results) -> dict[str, dict[str, float]]:
    """By judge, the requests, tokens and cost of all models and metrics together; no cost where a part is not known."""
    took: dict[str, list[Mapping[str, Any]]] = {}
    for result in results.models:
        for one in result.details.get("judge", {}).values():
            if "model" in one:
                took.setdefault(one["model"], []).append(one)
    counts = (
        "requests",
        "cached",
        "prompt_tokens",
        "completion_tokens",
        "requests_without_token_counts",
        "cost",
    )
    return {
        model: {
            name: sum(one.get(name, 0) for one in parts)
            for name in counts
            if (
                all(name in one for one in parts)
                if name == "cost"
                else any(name in one for one in parts)
            )
        }
        for model, parts in took.items()
    }


def show_judges(results: Results) -> None:
    """A line for each judge: what it was asked, and what that took."""
    for model, took in judges_took(results).items():
        parts = [f"{took['requests']:,} requests, {took['cached']:,} more answered from the cache"]
        parts.append(
            f"{took['prompt_tokens']:,} + {took['completion_tokens']:,} tokens (sent + answered)"
        )
        if uncounted := took.get("requests_without_token_counts"):
            parts.append(f"{uncounted:,} requests whose tokens the endpoint did not count")
        if "cost" in took:
            parts.append(f"cost {took['cost']:.4g} in the currency of its price")
        say(f"judge {model}: {'; '.join(parts)}")


def show_samples(results: list[ModelResult], shown: int) -> None:
    """Conversations of each evaluator and language, evenly spread, with every model's replies."""
    samples = results[0].samples if results else []
    for evaluator, language in dict.fromkeys(
        (one.evaluator, one.exchange.conversation.language) for one in samples
    ):
        places = [
            place
            for place, one in enumerate(samples)
            if (one.evaluator, one.exchange.conversation.language) == (evaluator, language)
        ]
        for place in (
            places[number * len(places) // shown] for number in range(min(shown, len(places)))
        ):
            grid = Table.grid(padding=(0, 2))
            grid.add_column(style="bold", no_wrap=True)
            grid.add_column(overflow="fold")
            for result in results:
                grid.add_row(Text(result.name), _shown(result.samples[place]))
            question = " / ".join(samples[place].exchange.conversation.questions.split("\n"))
            console.print(Panel(grid, title=Text(f"{language}: {question}"), title_align="left"))


def _shown(sample: Sample) -> Text:
    """The replies, a line each, and what was found of them."""
    lines = Text("\n").join(
        [_shown_reply(sample.exchange, turn) for turn in range(len(sample.exchange.replies))]
    )
    for reason in sample.why:
        lines.append(f"\n  · {_visible(reason)}", "dim")
    return lines


def _shown_reply(exchange: Exchange, turn: int) -> Text:
    """As plain text, never as rich's markup (`[/INST]`), and with control characters made visible."""
    reply = exchange.replies[turn]
    return Text.assemble(
        _visible(reply.text[:SHOWN_CHARACTERS]), ("" if reply.stopped else " … (cut off)", "dim")
    )


def _visible(text: str) -> str:
    return repr(text)[1:-1]
