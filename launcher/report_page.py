"""The report as one HTML page that needs nothing but itself: no network, no script, figures as data URIs."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template
from markupsafe import Markup

from launcher.report import RunView, StageView, duration, number, score_pivots
from launcher.report_curves import Line, draw_chart, short
from tracking import Cell, StageLog
from tracking.local import STEP, Table

AXES = {"step": STEP, "tokens": "train/tokens"}  # what the curves can be drawn over
SHOWN_PROMPTS = 6  # per language; samples.jsonl has all
SHOWN_ROWS = 200  # of a table
OWN_PLACE = ("eval/scores", "eval/samples")  # tables that are shown in a form of their own

# facet -> what a reply is called that has it, and one that has not
FACETS = {
    "stopped": ("stops", "cut off"),
    "in_language": ("in language", "other language"),
    "keeps_format": ("keeps format", "breaks format"),
}

# title -> what a metric's name begins and ends with
CHARTS = {
    "loss (nats per token)": ("train/loss", ""),
    "held-out bits per byte": ("valid/", "/bits_per_byte"),
    "tokens per second": ("train/tokens_per_second", ""),
    "learning rate": ("train/learning_rate", ""),
    "gradient norm": ("train/gradient_norm", ""),
    "held-out loss (nats per token)": ("valid/", "/loss"),
}


@dataclass(frozen=True)
class Chart:
    """One chart, drawn over each axis that there are values for."""

    title: str
    newest: list[tuple[str, str]]  # of each line: name, newest value
    drawings: dict[str, Markup]  # axis -> SVG


@dataclass(frozen=True)
class Question:
    """One prompt and what every model replied."""

    prompt: str
    replies: list[dict[str, Cell]]


def render_page(view: RunView, written: str) -> str:
    """The page. `written` is when."""
    evaluation = view.log("evaluation")
    return _template().render(
        view=view,
        written=written,
        group=next((stage.log.run.get("group") for stage in view.stages if stage.log.run), ""),
        alerts=[(stage.name, alert) for stage in view.stages for alert in stage.log.alerts],
        pivots=score_pivots(evaluation),
        charts=draw_charts(view.log("training")),
        questions=questions(evaluation),
        images={stage.name: {name: data_uri(path) for name, path in stage.log.images.items()} for stage in view.stages},
        tables={stage.name: _other_tables(stage) for stage in view.stages},
        settings=json.dumps(_settings(view), indent=2, ensure_ascii=False),
        shown_rows=SHOWN_ROWS,
        shown_prompts=SHOWN_PROMPTS,
    )


def draw_charts(log: StageLog) -> list[Chart]:
    """The training curves, those that have values."""
    names = list(dict.fromkeys(name for row in log.rows for name in row))
    charts = []
    for title, (begin, end) in CHARTS.items():
        chosen = [name for name in names if name == begin or (end and name.startswith(begin) and name.endswith(end))]
        drawings = {}
        for label, axis in AXES.items():
            lines = [Line(_line_name(name, begin, end), log.series(name, by=axis)) for name in chosen]
            drawing = draw_chart(title, [line for line in lines if line.points], label)
            if drawing:
                drawings[label] = Markup(drawing)
        if drawings:
            newest = [
                (_line_name(name, begin, end), short(log.series(name)[-1][1])) for name in chosen if log.series(name)
            ]
            charts.append(Chart(title, newest, drawings))
    return charts


def _line_name(metric: str, begin: str, end: str) -> str:
    return metric.removeprefix(begin).removesuffix(end) or metric.rpartition("/")[2]


def questions(log: StageLog) -> dict[str, list[Question]]:
    """By language, the first prompts with every model's reply side by side."""
    table = log.tables.get("eval/samples")
    found: dict[str, dict[str, list[dict[str, Cell]]]] = {}
    for cells in table.rows if table else []:
        row = dict(zip(table.columns, cells, strict=True)) if table else {}
        prompts = found.setdefault(str(row["language"]), {})
        if str(row["prompt"]) in prompts or len(prompts) < SHOWN_PROMPTS:
            replies = prompts.setdefault(str(row["prompt"]), [])
            if all(reply["model"] != row["model"] for reply in replies):  # the same prompt may be asked twice
                replies.append(row)
    return {
        language: [Question(prompt, replies) for prompt, replies in prompts.items()]
        for language, prompts in found.items()
    }


def _other_tables(stage: StageView) -> dict[str, Table]:
    return {name: table for name, table in stage.log.tables.items() if name not in OWN_PLACE}


def _settings(view: RunView) -> Mapping[str, Any]:
    """The recipe, as the newest stage logged it."""
    for stage in reversed(view.stages):
        settings: dict[str, Any] = stage.log.run.get("settings", {})
        if settings:
            return dict(settings.get("recipe", settings))
    return {}


def data_uri(path: Path) -> str:
    """A picture as text."""
    return f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}"


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=number, duration=duration, facets=_facets)
    return environment.from_string(TEMPLATE)


def _facets(reply: Mapping[str, Cell]) -> list[tuple[str, bool]]:
    """The yes-or-no facets of a reply, in words."""
    return [(words[not reply[facet]], bool(reply[facet])) for facet, words in FACETS.items()]


TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ view.name }} · cpt-merge</title>
<style>
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --text: #1b2026; --soft: #66707c; --line: #e2e6eb;
  --good: #0a7d57; --bad: #b3450a; --good-soft: #e0f3ec; --bad-soft: #fbe9dd;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #9c7a00; --c5: #4e79a7;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1c2026; --text: #e5e9ee; --soft: #98a3b0; --line: #323941;
    --good: #5fd3a8; --bad: #f0a070; --good-soft: #17352b; --bad-soft: #40291b;
    --c0: #56b4e9; --c1: #f28e4b; --c2: #3ecfa0; --c3: #e39ac4; --c4: #e6c34a; --c5: #9ab8e0;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text); line-height: 1.45;
  font: 15px/1.5 system-ui, "Noto Sans", "Noto Sans CJK TC", "Noto Sans KR", sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 26px; margin: 0; }
h2 { font-size: 18px; margin: 36px 0 12px; }
h3 { font-size: 14px; margin: 0 0 8px; }
p.about, .soft { color: var(--soft); }
p.about { margin: 4px 0 0; }
.grid + p.about { margin-top: 10px; }
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; overflow-x: auto;
}
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
.wide, .figures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 600; font-size: 13px; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child > td { border-bottom: 0; }
td.number, th.number { text-align: right; white-space: nowrap; }
.badge { border-radius: 99px; padding: 1px 9px; font-size: 12.5px; white-space: nowrap; }
.yes { background: var(--good-soft); color: var(--good); }
.no { background: var(--bad-soft); color: var(--bad); }
.results span { display: inline-block; margin-right: 14px; }
.figures { align-items: start; margin-top: 14px; }
img { display: block; width: 100%; border-radius: 6px; background: #fff; }
figure { margin: 0; }
figcaption { color: var(--soft); font-size: 13px; margin-bottom: 6px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .axis { stroke: var(--soft); stroke-width: 1; }
svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
{% for c in range(6) %}
svg polyline.c{{ c }} { stroke: var(--c{{ c }}); }
svg circle.c{{ c }} { fill: var(--c{{ c }}); }
.key.c{{ c }} { background: var(--c{{ c }}); }
{% endfor %}
.legend { font-size: 13px; margin: 0 0 4px; }
.legend span { margin-right: 14px; white-space: nowrap; }
.key { display: inline-block; width: 12px; height: 3px; border-radius: 2px; vertical-align: middle; margin-right: 5px; }
fieldset { border: 0; padding: 0; margin: 0 0 12px; color: var(--soft); }
fieldset label { margin-right: 14px; cursor: pointer; }
.tokens { display: none; }
section:has(#by-tokens:checked) .tokens { display: block; }
section:has(#by-tokens:checked) .step { display: none; }
.question { margin-bottom: 12px; }
.question .prompt { font-weight: 600; margin: 0 0 6px; }
.question td:first-child { width: 90px; color: var(--soft); }
.question td:last-child { width: 270px; text-align: right; }
.reply { white-space: pre-wrap; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12.5px; margin: 10px 0 0; }
summary { cursor: pointer; }
</style>
</head>
<body><main>
<h1>{{ view.name }}</h1>
<p class="about">cpt-merge run in {{ view.directory }}
{%- if group %}, W&amp;B group {{ group }}{% endif %}; written {{ written }}</p>

<h2>Stages</h2>
<div class="card"><table>
<tr><th>stage</th><th>state</th><th class="number">time</th><th>results</th></tr>
{% for stage in view.stages %}
<tr><td>{{ stage.name }}</td>
<td><span class="badge {{ 'yes' if stage.record else 'no' }}">{{ stage.state }}</span></td>
<td class="number">{{ stage.seconds | duration }}</td>
<td class="results">
{% if stage.name == "evaluation" and pivots %}<span class="soft">below</span>
{% else %}{% for name, value in stage.results.items() if value is not mapping %}
<span><span class="soft">{{ name }}</span> {{ value | number }}</span>
{% endfor %}{% endif %}</td></tr>
{% endfor %}
</table></div>

{% if alerts %}
<h2>Alerts</h2>
<div class="card">
{% for stage, alert in alerts %}
<div><span class="badge no">{{ stage }}</span> <b>{{ alert.title }}</b>: {{ alert.text }}</div>
{% endfor %}
</div>
{% endif %}

{% if pivots %}
<h2>Evaluation</h2>
<div class="grid">
{% for figure, (languages, rows) in pivots.items() %}
<div class="card"><h3>{{ figure | replace("_", " ") }}</h3><table>
<tr><th>model</th>{% for language in languages %}<th class="number">{{ language }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr><td>{{ row[0] }}</td>{% for cell in row[1:] %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endfor %}
</div>
<p class="about">chat: share of replies that stop by themselves, are in the prompt's language and keep the format.
Intervals and counts: evaluation/results.json.</p>
{% endif %}

{% for stage, found in images.items() if found %}
<div class="grid figures">
{% for name, uri in found.items() %}
<figure class="card"><figcaption>{{ name }}</figcaption><img src="{{ uri }}" alt="{{ name }}"></figure>
{% endfor %}
</div>
{% endfor %}

{% if charts %}
<section>
<h2>Training</h2>
<fieldset>over
<label><input type="radio" name="axis" id="by-step" checked> steps</label>
<label><input type="radio" name="axis" id="by-tokens"> tokens</label></fieldset>
<div class="grid wide">
{% for chart in charts %}
<div class="card"><h3>{{ chart.title }}</h3>
<p class="legend">
{% for name, value in chart.newest %}
<span><i class="key c{{ loop.index0 % 6 }}"></i>{{ name }} <b>{{ value }}</b></span>
{% endfor %}
</p>
{% for axis, drawing in chart.drawings.items() %}<div class="{{ axis }}">{{ drawing }}</div>{% endfor %}
</div>
{% endfor %}
</div>
</section>
{% endif %}

{% if questions %}
<h2>Sample replies</h2>
<p class="about">The first {{ shown_prompts }} prompts of each language; all are in evaluation/samples.jsonl.</p>
{% for language, asked in questions.items() %}
<h3 style="margin-top: 16px">{{ language }}</h3>
{% for question in asked %}
<div class="card question" lang="{{ language | replace('_', '-') }}"><p class="prompt">{{ question.prompt }}</p><table>
{% for reply in question.replies %}
<tr><td>{{ reply.model }}</td><td class="reply">{{ reply.reply }}</td>
<td>{% for words, holds in reply | facets %}<span class="badge {{ 'yes' if holds else 'no' }}">{{ words }}</span>
{% endfor %}</td></tr>
{% endfor %}
</table></div>
{% endfor %}
{% endfor %}
{% endif %}

{% for stage, found in tables.items() %}
{% for name, table in found.items() %}
<h2>{{ name }}</h2>
<div class="card"><table>
<tr>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in table.rows[:shown_rows] %}
<tr>{% for cell in row %}<td>{{ cell | number }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% if table.rows | length > shown_rows %}
<p class="about">{{ shown_rows }} of {{ table.rows | length }} rows; all: {{ stage }}/log/tables/{{ name }}.json.</p>
{% endif %}
</div>
{% endfor %}
{% endfor %}

<h2>Recipe</h2>
<details class="card"><summary>as it was run, overrides and defaults included</summary>
<pre>{{ settings }}</pre></details>
</main></body>
</html>
"""
