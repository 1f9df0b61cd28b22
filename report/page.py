"""The report as one HTML page: charts are inline SVG, pictures data URIs, no script."""

from __future__ import annotations

import json
import math
import time
from base64 import b64encode
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, Template

from cpt_merge.core.progress import counted
from cpt_merge.report.charts import (
    Chart,
    Palette,
    data_charts,
    has_wide_bars,
    merge_charts,
    models_of,
    preview_charts,
    score_charts,
    sweep_charts,
    tokenizer_charts,
    training_charts,
)
from cpt_merge.report.headline import (
    language_name,
    run_state,
    stage_marks,
    tiles,
    training_progress,
    verdict,
)
from cpt_merge.report.preparation import effect_table
from cpt_merge.report.view import (
    RunView,
    StageView,
    baseline_of,
    changes_of,
    duration,
    metrics_of,
    number,
    scores_of,
    sweep_table,
    title_of,
)
from cpt_merge.tracking import Cell, StageLog, Table

T = TypeVar("T")
TEMPLATE = Path(__file__).with_suffix(".html")
SHOWN_PROMPTS, MOST_PROMPTS = 2, 60  # per language: at once, and at all; samples.jsonl has all
MOST_CHARACTERS = 1500  # of a reply
FILE_CHARACTERS = 20_000  # of a logged file
SHOWN_STEPS = 8  # of the continuations of one prompt, or of the previews' replies
OPEN_ROWS, MOST_ROWS = 8, 300  # of a table: open at once up to, and at all
# tables that are shown in a form of their own
OWN_PLACE = (
    "eval/samples",
    "train/continuations",
    "preview/replies",
    "sweep/ratios",
    "data/preparation",
)

# property -> what a reply is called that has it, and one that has not
BADGES = {
    "stopped": ("stops", "cut off"),
    "in_language": ("in language", "other language"),
    "keeps_format": ("keeps format", "breaks format"),
}


@dataclass(frozen=True)
class Question:
    """One prompt and what every model replied."""

    prompt: str
    replies: list[dict[str, Cell]]


@dataclass(frozen=True)
class Previewed:
    """One prompt of the previews during training, and what the chat model replied."""

    prompt: str
    newest: dict[str, Cell]
    earlier: list[dict[str, Cell]]  # oldest first


@dataclass(frozen=True)
class StageSection:
    """What a stage logged, apart from what is shown in a form of its own."""

    stage: StageView
    charts: list[Chart]
    tables: dict[str, Table]
    opened: list[str]  # tables that are not folded
    images: dict[str, str]  # name -> data URI
    metrics: list[tuple[str, int, float, float, float]]  # name, rows, newest, smallest, largest
    results: list[tuple[str, Any]]
    files: dict[str, str]  # name -> content


def render_page(view: RunView, now: float) -> str:
    """The page, as of the time `now`."""
    evaluation, training, palette = view.log("evaluation"), view.log("training"), Palette(view)
    metrics = metrics_of(evaluation)
    draw = {
        "tokenizer": tokenizer_charts, "data": data_charts, "merge": merge_charts,
        "finetune": training_charts, "finetune_merge": merge_charts, "dpo": training_charts,
    }  # fmt: skip
    sections = []
    for stage in view.stages:
        charts = draw[stage.name](stage.log, palette) if stage.name in draw else []
        sections.append(_section(stage, charts))
    sweep = view.sweep and _section(view.sweep, sweep_charts(view.sweep.log, metrics, palette))
    return _template().render(
        view=view,
        written=time.strftime("%Y-%m-%d %H:%M", time.localtime(now)),
        group=next((stage.log.run.get("group") for stage in view.stages if stage.log.run), ""),
        state=run_state(view, now),
        progress=training_progress(view),
        strip=stage_marks(view),
        tiles=tiles(view),
        artifacts=[
            (stage.name, "reads" if one.used else "makes", one.kind, one.name, one.uri, one.digest)
            for stage in view.logged
            for one in stage.log.artifacts
        ],
        models=[(name, palette.model(name)) for name in models_of(evaluation)],
        palette=palette,
        verdict=verdict(view),
        baseline=baseline_of(evaluation),
        changes=changes_of(evaluation),
        bars=score_charts(evaluation, palette),
        wide_bars=has_wide_bars(evaluation),
        charts=training_charts(training, palette),
        preview_charts=preview_charts(training, metrics, palette),
        previews=_previews(training),
        questions=_questions(evaluation),
        continuations=_continuations(training),
        sections=sections,
        sweep=sweep,
        ratios=sweep_table(view),
        effects=effect_table(view.log("data")),
        origins=_origins(view),
        settings=_json(view.recipe),
        shown_prompts=SHOWN_PROMPTS,
        most_prompts=MOST_PROMPTS,
        most_rows=MOST_ROWS,
    )


def _section(stage: StageView, charts: list[Chart]) -> StageSection:
    tables = {name: table for name, table in stage.log.tables.items() if name not in OWN_PLACE}
    drawn = bool(charts) or stage.name in ("training", "evaluation")
    shown = {f"{model}/{language}/{metric}" for metric, model, language in scores_of(stage.log)}
    small = [name for name, table in tables.items() if len(table.rows) <= OPEN_ROWS]
    return StageSection(
        stage,
        charts,
        tables,
        [name for name in small if not drawn or name.endswith(("examples", "not_run"))],
        {
            name: f"data:image/{path.suffix[1:]};base64,{b64encode(path.read_bytes()).decode()}"
            for name, path in stage.log.images.items()
        },
        _metrics(stage.log, shown),
        _results(stage, shown),
        {name: _content(path) for name, path in stage.log.files.items()},
    )


def _content(path: Path) -> str:
    """A logged file's text, or its beginning."""
    text = path.read_text(encoding="utf-8", errors="replace")
    over = len(text) - FILE_CHARACTERS
    if over <= 0:
        return text
    return f"{text[:FILE_CHARACTERS]}\n… ({counted(over, 'more character')} in {path})"


def _metrics(log: StageLog, shown: Collection[str]) -> list[tuple[str, int, float, float, float]]:
    """For every metric not `shown` before: number of rows, newest, smallest and largest value."""
    values: dict[str, list[float]] = {}
    for row in log.rows:
        for name, value in row.items():
            if name != "time" and name.partition("/")[2] not in shown:
                values.setdefault(name, []).append(value)
    found = []
    for name, all_of_it in values.items():
        finite = [value for value in all_of_it if math.isfinite(value)] or [math.nan]
        found.append((name, len(all_of_it), all_of_it[-1], min(finite), max(finite)))
    return found


def _results(stage: StageView, shown: Collection[str]) -> list[tuple[str, Any]]:
    """A stage's results and summary, mappings spread out by dots; without those `shown` before."""
    summary = {name.partition("/")[2]: value for name, value in stage.log.summary.items()}
    return [
        (name, value) for name, value in _spread({**summary, **stage.results}) if name not in shown
    ]


def _spread(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _spread(value, f"{prefix}{name}.")
        else:
            yield (
                f"{prefix}{name}",
                ", ".join(map(str, value)) or None if isinstance(value, list) else value,
            )


def _questions(log: StageLog) -> dict[str, list[Question]]:
    """By language, the prompts with every model's reply side by side."""
    found: dict[str, dict[str, list[dict[str, Cell]]]] = {}
    for row in log.records("eval/samples"):
        prompts = found.setdefault(str(row["language"]), {})
        if str(row["prompt"]) in prompts or len(prompts) < MOST_PROMPTS:
            replies = prompts.setdefault(str(row["prompt"]), [])
            if all(reply["model"] != row["model"] for reply in replies):  # a prompt may come twice
                replies.append({**row, **_cut_texts(row)})
    return {
        language: [Question(prompt, replies) for prompt, replies in prompts.items()]
        for language, prompts in found.items()
    }


def _continuations(log: StageLog) -> list[tuple[str, str, list[tuple[Cell, str]]]]:
    """(language, prompt, [(step, continuation), ...]) of held-out text, at evenly spread steps."""
    found: dict[tuple[str, str], list[tuple[Cell, str]]] = {}
    for row in log.records("train/continuations"):
        names = str(row["language"]), str(row["prompt"])
        found.setdefault(names, []).append((row["step"], _cut(str(row["continuation"]))))
    return [(*names, _spread_evenly(texts)) for names, texts in found.items()]


def _previews(log: StageLog) -> dict[str, list[Previewed]]:
    """By language, the prompts with the newest reply and evenly spread earlier ones."""
    found: dict[tuple[str, str], list[dict[str, Cell]]] = {}
    for row in log.records("preview/replies"):
        names = str(row["language"]), str(row["prompt"])
        found.setdefault(names, []).append({**row, **_cut_texts(row)})
    asked: dict[str, list[Previewed]] = {}
    for (language, prompt), replies in found.items():
        *earlier, newest = _spread_evenly(replies)
        asked.setdefault(language, []).append(Previewed(prompt, newest, earlier))
    return asked


def _cut_texts(row: Mapping[str, Cell]) -> dict[str, Cell]:
    """A reply and, if it has one, its thought for display."""
    return {name: _cut(str(row[name])) for name in ("thought", "reply") if row.get(name)}


def _cut(text: str) -> str:
    """A reply for display: leading line breaks as signs, and no longer than allowed."""
    words = text.lstrip("\n")
    text, over = "⏎" * (len(text) - len(words)) + words, len(words) - MOST_CHARACTERS
    return f"{text[:MOST_CHARACTERS]} … ({counted(over, 'more character')})" if over > 0 else text


def _spread_evenly(said: list[T]) -> list[T]:
    """The first, the last, and some in between."""
    if len(said) <= SHOWN_STEPS:
        return said
    return [
        said[round(place * (len(said) - 1) / (SHOWN_STEPS - 1))] for place in range(SHOWN_STEPS)
    ]


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": number, "duration": duration, "badges": _badges, "numeric": _numeric,
        "clock": _clock, "measured": _measured, "counted": counted, "titled": title_of,
        "language": language_name,
    }  # fmt: skip
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _origins(view: RunView) -> list[tuple[str, str]]:
    """For each stage, where its result comes from, as JSON; the recipe is displayed once, apart."""
    found = []
    for stage in view.logged:
        settings = stage.log.run.get("settings", {})
        known = {**stage.log.run, "settings": {k: v for k, v in settings.items() if k != "recipe"}}
        if stage.record:
            known |= {"inputs": stage.record.inputs, "versions": stage.record.versions}
        found.append((stage.name, _json(known)))
    return found


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False)


def _clock(when: float) -> str:
    """Month, day and local time; empty if unknown."""
    return time.strftime("%m-%d %H:%M:%S", time.localtime(when)) if when else ""


def _numeric(table: Table) -> list[bool]:
    """Which columns hold numbers only."""
    kinds = [
        {type(row[place]) for row in table.rows} - {type(None)}
        for place in range(len(table.columns))
    ]
    return [bool(kind) and kind <= {int, float} for kind in kinds]


def _measured(reply: Mapping[str, Cell]) -> str:
    """How long a reply is and how much of it repeats itself."""
    parts = [counted(int(reply["tokens"] or 0), "token")] if "tokens" in reply else []
    repetition = reply.get("repetition")
    parts += [f"{100 * repetition:.0f} % repeated"] if isinstance(repetition, float) else []
    checks = reply.get("instruction_checks")
    parts += [f"{100 * checks:.0f} % of its checks passed"] if isinstance(checks, float) else []
    return ", ".join(parts)


def _badges(reply: Mapping[str, Cell]) -> list[tuple[str, bool]]:
    """The yes-or-no properties of a reply, in words; every turn of a dialogue has to have them."""
    held = {name: reply[name] == 1 for name in BADGES if name in reply}
    return [(words[not held[name]], held[name]) for name, words in BADGES.items() if name in held]
