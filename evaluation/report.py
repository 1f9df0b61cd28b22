"""What an evaluation leaves: results.json, samples.jsonl, figures, tables on the terminal, the tracker's rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from core.artifact import write_json, write_text
from core.languages import find_language
from core.progress import console
from evaluation.config import EvaluationConfig
from evaluation.figures import draw_bits_per_byte, draw_facets
from evaluation.generate import Reply
from evaluation.intervals import Estimate
from evaluation.results import BITS, FACETS, ModelResult, Scores, languages_with
from tracking import Cell, Tracker

HEADINGS = {
    BITS: "bits/byte", "chat": "chat", "stopped": "stopped", "in_language": "in language", "keeps_format": "format",
    "repetition": "repetition",
}  # fmt: skip
SHOWN_CHARACTERS = 400  # of a sample's reply on the terminal


def report(
    config: EvaluationConfig,
    models: Mapping[str, Path],
    results: Sequence[ModelResult],
    scores: Scores,
    out: Path,
    tracker: Tracker,
) -> None:
    """Write and show everything."""
    write_results(out / "results.json", config, models, results, scores)
    write_text(
        out / "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sample_rows(results))
    )
    figures = {"bits_per_byte": draw_bits_per_byte(scores, out / "bits_per_byte.png")}
    if any(result.samples for result in results):
        figures["replies"] = draw_facets(scores, out / "replies.png")
    track(results, scores, figures, tracker)
    tracker.file("evaluation-results.json", out / "results.json")
    show_scores(scores)
    show_samples(results, config.samples_shown)


def flat(scores: Scores) -> dict[str, float]:
    """`model/language/figure` -> value, four digits behind the point."""
    return {
        f"{model}/{language}/{figure}": round(estimate.value, 4) for model, language, figure, estimate in each(scores)
    }


def each(scores: Scores) -> Iterator[tuple[str, str, str, Estimate]]:
    """(model, language, figure, estimate) of every score."""
    for model, languages in scores.items():
        for language, figures in languages.items():
            for figure, estimate in figures.items():
                yield model, language, figure, estimate


def write_results(
    path: Path, config: EvaluationConfig, models: Mapping[str, Path], results: Sequence[ModelResult], scores: Scores
) -> None:
    """Every figure with its interval and n, what it rests on, and the settings that made it."""
    content: dict[str, object] = {"config": config.model_dump(), "models": {}}
    content["models"] = {
        result.name: {
            "directory": str(models[result.name]),
            "generated_tokens_per_second": round(result.tokens_per_second, 2),
            "text": {
                language: {
                    "documents": len(documents),
                    "bytes": sum(document.bytes for document in documents),
                    "tokens": sum(document.tokens for document in documents),
                }
                for language, documents in result.documents.items()
            },
            "scores": {
                language: {figure: asdict(estimate) for figure, estimate in figures.items()}
                for language, figures in scores[result.name].items()
            },
        }
        for result in results
    }
    write_json(path, content)


def sample_rows(results: Sequence[ModelResult]) -> Iterator[dict[str, object]]:
    """One row per model and prompt."""
    for result in results:
        for sample in result.samples:
            facets = asdict(sample.facets)
            yield {
                "model": result.name,
                "language": sample.prompt.language,
                "messages": sample.prompt.messages,
                "reply": sample.reply.text,
                "tokens": sample.reply.tokens,
                "chat": sample.facets.chat,
                **{name: round(value, 4) if isinstance(value, float) else value for name, value in facets.items()},
            }


def track(results: Sequence[ModelResult], scores: Scores, figures: Mapping[str, Path], tracker: Tracker) -> None:
    """Send the figures, the tables and the images."""
    metrics = {f"eval/{name}": value for name, value in flat(scores).items()}
    speeds = {f"eval/{result.name}/tokens_per_second": result.tokens_per_second for result in results if result.samples}
    tracker.log({**metrics, **speeds})
    tracker.summary(metrics)
    columns = ["model", "language", "figure", "value", "low", "high", "n"]
    score_rows: list[list[Cell]] = [[*names, e.value, e.low, e.high, e.n] for *names, e in each(scores)]
    tracker.table("eval/scores", columns, score_rows)
    columns = ["language", "prompt", "model", "reply", "tokens", *FACETS]
    rows: list[list[Cell]] = [
        [sample.prompt.language, sample.prompt.messages[-1]["content"], result.name, sample.reply.text,
         sample.reply.tokens, *sample.facets.values().values()]
        for result in results for sample in result.samples
    ]  # fmt: skip
    if rows:
        tracker.table("eval/samples", columns, rows)
    for name, path in figures.items():
        tracker.image(f"eval/{name}", path)


def show_scores(scores: Scores) -> None:
    """One table per language: models down, figures across, each over its interval."""
    for language in dict.fromkeys(language for model in scores.values() for language in model):
        figures = [figure for figure in HEADINGS if language in languages_with(scores, figure)]
        first = next(iter(scores.values()))[language]
        counted = [f"{first[BITS].n} documents"] if BITS in first else []
        counted += [f"{first['chat'].n} replies"] if "chat" in first else []
        title = f"{find_language(language).name}: {', '.join(counted)}; below each value its 95 % interval"
        table = Table("model", title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1))
        for figure in figures:
            table.add_column(HEADINGS[figure], justify="right")
        for model, languages in scores.items():
            table.add_row(model, *(_cell(figure, languages[language][figure]) for figure in figures))
        console.print(table)


def _cell(figure: str, estimate: Estimate) -> Text:
    if figure == BITS:
        return Text.assemble(f"{estimate.value:.3f}\n", (f"{estimate.low:.3f}–{estimate.high:.3f}", "dim"))
    return Text.assemble(f"{estimate.value:.0%}\n", (f"{100 * estimate.low:.0f}–{estimate.high:.0%}", "dim"))


def show_samples(results: Sequence[ModelResult], shown: int) -> None:
    """Prompts of each language, evenly spread over the file, with every model's reply."""
    samples = results[0].samples if results else []
    for language in dict.fromkeys(sample.prompt.language for sample in samples):
        places = [place for place, sample in enumerate(samples) if sample.prompt.language == language]
        for place in (places[number * len(places) // shown] for number in range(min(shown, len(places)))):
            grid = Table.grid(padding=(0, 2))
            grid.add_column(style="bold", no_wrap=True)
            grid.add_column(overflow="fold")
            for result in results:
                grid.add_row(Text(result.name), _shown_reply(result.samples[place].reply))
            question = samples[place].prompt.messages[-1]["content"]
            console.print(Panel(grid, title=Text(f"{language}: {question}"), title_align="left"))


def _shown_reply(reply: Reply) -> Text:
    """As plain text, never as rich's markup (`[/INST]`), and with control characters made visible."""
    end = "" if reply.stopped else " … (cut off)"
    return Text.assemble(repr(reply.text[:SHOWN_CHARACTERS])[1:-1], (end, "dim"))
