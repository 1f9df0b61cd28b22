"""The tables and messages that an evaluation prints on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cpt_merge.core.languages import find_language
from cpt_merge.core.progress import console, counted, say
from cpt_merge.evaluation.conversation import Reply
from cpt_merge.evaluation.evaluators.evaluator import Metric, NotRun
from cpt_merge.evaluation.results import ModelResult, Results, Sample, each, languages_with
from cpt_merge.evaluation.statistics import Estimate, PairedDifference, fewest_units

SHOWN_CHARACTERS = 400  # of a reply
SHOWN_OF_THOUGHT = 160  # characters
NAMED = 6  # differences per model in the first sentence
SHOWN_GROUPS = 8  # of a breakdown; results.json has all
UNITS = {"language": "document", "knowledge": "question"}  # evaluator -> what n counts


def show(results: Results, judges: Mapping[str, Mapping[str, float]], samples: int) -> None:
    """Print everything; `samples` is the number of sample conversations per language."""
    if results.differences:
        say(what_differs(results))
    _show_scores(results)
    _show_breakdowns(results)
    _show_not_run(results)
    show_left_out(results)
    show_judges(judges)
    show_samples(results.models, samples)


def what_differs(results: Results) -> str:
    """The sentence that a person reads first: which differences to the baseline are no chance.

    Where no difference could have been beyond chance, it says so instead of that there is none.
    """
    compared = _count_differences(results)
    needed = fewest_units(max(compared, 1))
    models, some_few = [], False
    for model, of_languages in results.differences.items():
        found = [
            (f"{language} {_change(results.metrics[metric], one)}", one)
            for language, of_metrics in of_languages.items()
            for metric, one in of_metrics.items()
        ]
        named = [name for name, one in found if one.beyond]
        few = [one.n for _, one in found if not one.beyond and one.n < needed]
        some_few = some_few or bool(few)
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        parts = [", ".join(named[:NAMED]) + more] if named else []
        if not named and len(few) < len(found):
            parts = ["nothing differs"]
        if few:
            of = f" in {len(few)} of {len(found)}" if len(few) < len(found) else ""
            parts.append(f"too few to tell{of} ({_range(few)})")
        models.append(f"{model}: {', '.join(parts) or 'nothing to compare'}")
    start = f"evaluation: {counted(compared, 'difference')} to {results.baseline} compared: "
    fewest = f"; one needs at least {needed} documents or prompts" if some_few else ""
    return start + "; ".join(models) + f" (at 5 %, Holm's correction{fewest})"


def _range(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most}"


def _change(metric: Metric, difference: PairedDifference) -> str:
    change = f"{100 * difference.value:+.0f}" if metric.share else f"{difference.value:+.3f}"
    return f"{metric.name} {change}"


def _count_differences(results: Results) -> int:
    return sum(1 for _ in each(results.differences))


def show_overview(results: Results) -> None:
    """A table per language: a row for each model, a column for what each evaluator reports first.

    Of the knowledge suites, every task has a column.
    """
    names = [
        name
        for evaluator, own in results.evaluators.items()
        for name in (own if evaluator == "knowledge" else own[:1])
    ]
    for language in _languages(results):
        metrics = [
            results.metrics[name]
            for name in names
            if language in languages_with(results.scores, name)
        ]
        if metrics:
            console.print(_score_table(results, language, find_language(language).name, metrics))
    _note_differences(results)


def _languages(results: Results) -> list[str]:
    return list(dict.fromkeys(tag for found in results.scores.values() for tag in found))


def _show_scores(results: Results) -> None:
    """A table per language and evaluator: a row for each model, a column for each metric."""
    for language in _languages(results):
        for evaluator, names in results.evaluators.items():
            metrics = [
                results.metrics[name]
                for name in names
                if language in languages_with(results.scores, name)
            ]
            if metrics:
                found = [of_model.get(language, {}) for of_model in results.scores.values()]
                n = max(one[m.name].n for one in found for m in metrics if m.name in one)
                units = counted(n, UNITS.get(evaluator, "conversation"))
                title = f"{find_language(language).name}, {evaluator}: {units}"
                console.print(_score_table(results, language, title, metrics))
    _note_differences(results)


def _note_differences(results: Results) -> None:
    if results.differences:
        note = (
            f"below each value: its 95 % interval, and the difference to {results.baseline}, with "
            f"* if it remains after Holm's correction for {_count_differences(results)} comparisons"
        )
        console.print(Text(note, style="dim"))


def _score_table(results: Results, language: str, title: str, metrics: list[Metric]) -> Table:
    scores = {model: found.get(language, {}) for model, found in results.scores.items()}
    table = _table(title)
    table.add_column("model")
    for metric in metrics:
        n = max(found[metric.name].n for found in scores.values() if metric.name in found)
        table.add_column(f"{metric.heading}\nn = {n:,}", justify="right")
    for model, found in scores.items():
        changes = results.differences.get(model, {}).get(language, {})
        cells = [_cell(one, found.get(one.name), changes.get(one.name)) for one in metrics]
        table.add_row(model, *cells)
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)


def _cell(metric: Metric, estimate: Estimate | None, difference: PairedDifference | None) -> Text:
    """The value over its interval and its difference to the baseline."""
    if estimate is None:
        return Text("–", style="dim")
    if metric.share:
        value, interval = f"{estimate.value:.0%}", f"{100 * estimate.low:.0f}–{estimate.high:.0%}"
    else:
        value, interval = f"{estimate.value:.3f}", f"{estimate.low:.3f}–{estimate.high:.3f}"
    text = Text.assemble(f"{value}\n", (interval, "dim"))
    if difference:
        change = f"{100 * difference.value:+.0f}" if metric.share else f"{difference.value:+.3f}"
        style = "bold" if difference.beyond else "dim"
        text.append(f"\n{change}{'*' if difference.beyond else ''}", style)
    return text


def _show_breakdowns(results: Results) -> None:
    """A table per language and metric with groups (turns, categories); long ones are left out."""
    breakdowns = results.breakdowns
    for language, name in dict.fromkeys((names[1], names[2]) for *names, _ in each(breakdowns)):
        of_models = {
            model: found.get(language, {}).get(name, {}) for model, found in breakdowns.items()
        }
        groups = list(dict.fromkeys(group for found in of_models.values() for group in found))
        if len(groups) > SHOWN_GROUPS:
            continue
        metric = results.metrics[name]
        table = _table(f"{find_language(language).name}: {metric.meaning}, by kind")
        for column in ("", "n", *of_models):
            table.add_column(column)
        for group in groups:
            estimates = [found.get(group) for found in of_models.values()]
            n = max(estimate.n for estimate in estimates if estimate)
            form = "{:.0%}" if metric.share else "{:.2f}"
            cells = [form.format(one.value) if one else "–" for one in estimates]
            table.add_row(Text(group), str(n), *cells)
        console.print(table)


def _show_not_run(results: Results) -> None:
    """The metrics without a value, and the reasons."""
    models: dict[NotRun, list[str]] = {}
    for result in results.models:
        for one in result.not_run:
            models.setdefault(one, []).append(result.name)
    for one, names in models.items():
        say(f"{', '.join(names)}: {one.metric} was not run: {one.reason}")
    for reason in results.failed:
        say(f"evaluation: {reason}; run the same command again to ask for what is missing")


def not_scored(result: ModelResult) -> list[NotRun]:
    """What was left out of a model's metrics."""
    return [
        NotRun(metric, f"{count} left out: {reason}")
        for metric, reasons in result.details.get("not_scored", {}).items()
        for reason, count in reasons.items()
    ]


def show_left_out(results: Results) -> None:
    """What was left out of a metric, and the reason."""
    for result in results.models:
        for one in not_scored(result):
            say(f"{result.name}: {one.metric}: {one.reason}")


def show_judges(judges: Mapping[str, Mapping[str, float]]) -> None:
    """A line for each judge: its requests, tokens and cost."""
    for model, took in judges.items():
        sent, answered = took["prompt_tokens"], took["completion_tokens"]
        requests = counted(took["requests"], "request")
        parts = [
            f"{requests}, {took['cached']:,} more answered from the cache",
            f"{sent:,} + {answered:,} tokens (sent + answered)",
        ]
        if uncounted := took.get("requests_without_token_counts"):
            parts.append(f"{counted(uncounted, 'request')} whose tokens the endpoint did not count")
        if "cost" in took:
            parts.append(f"cost {took['cost']:.4g} in the currency of its price")
        say(f"judge {model}: {'; '.join(parts)}")


def show_samples(results: list[ModelResult], shown: int) -> None:
    """Conversations of each evaluator and language, evenly spread, with every model's replies."""
    places: dict[tuple[str, str], list[int]] = {}
    samples = results[0].samples if results else []
    for place, sample in enumerate(samples):
        key = sample.evaluator, sample.exchange.conversation.language
        places.setdefault(key, []).append(place)
    for (_, language), of_key in places.items():
        count = min(shown, len(of_key))
        for place in (of_key[number * len(of_key) // shown] for number in range(count)):
            grid = Table.grid(padding=(0, 2))
            grid.add_column(style="bold", no_wrap=True)
            grid.add_column(overflow="fold")
            for result in results:
                grid.add_row(Text(result.name), _shown(result.samples[place]))
            question = " / ".join(samples[place].exchange.conversation.questions.split("\n"))
            console.print(Panel(grid, title=Text(f"{language}: {question}"), title_align="left"))


def _shown(sample: Sample) -> Text:
    """The replies, one per line, and what was found in them.

    As plain text, since rich would read `[/INST]` as markup.
    """
    lines = Text("\n").join(
        Text.assemble(
            (_thought(reply), "dim italic"),
            _visible(reply.text[:SHOWN_CHARACTERS]),
            ("" if reply.stopped else " … (cut off)", "dim"),
        )
        for reply in sample.exchange.replies
    )
    for reason in sample.why:
        lines.append(f"\n  · {_visible(reason)}", "dim")
    return lines


def _thought(reply: Reply) -> str:
    """The thought before an answer, shortened; empty if there is none."""
    thought = _visible(reply.thought)
    more = " …" if len(thought) > SHOWN_OF_THOUGHT else ""
    return f"(thought: {thought[:SHOWN_OF_THOUGHT]}{more}) " if thought else ""


def _visible(text: str) -> str:
    """Text with its control characters as escapes."""
    return repr(text)[1:-1]
