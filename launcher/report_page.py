"""The report as one HTML page that needs nothing but itself: no network, no script, figures as data URIs."""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template
from markupsafe import Markup

from launcher.report import RunView, StageView, duration, figures_of, is_notice, matters, number
from launcher.report_bars import NARROW, WIDE, Bar, Series, draw_bars
from launcher.report_curves import MOST_POINTS, Form, Line, draw_chart, is_logarithmic, percent, short
from launcher.report_headline import progress, scores_of, strip, tiles, verdict
from tracking import Cell, StageLog
from tracking.local import STEP, Table

TEMPLATE = Path(__file__).with_suffix(".html")
AXES = {"step": STEP, "tokens": "train/tokens"}  # what the curves can be drawn over
MODELS = ("base", "chat", "cpt", "merged")  # with a colour of their own, the same everywhere
FURTHER_MODELS, LANGUAGE_COLOURS, PLAIN_COLOURS = 3, 6, 2
SHOWN_PROMPTS, MOST_PROMPTS = 2, 60  # per language: at once, and at all; samples.jsonl has all
MOST_CHARACTERS = 1500  # of a reply
FILE_CHARACTERS = 20_000  # of a logged file
SHOWN_STEPS = 8  # of the continuations of one prompt
NARROW_BARS = 20  # more than these in one chart need a wider one
OPEN_ROWS, MOST_ROWS = 8, 300  # of a table: open at once up to, and at all
OWN_PLACE = ("eval/samples", "train/continuations")  # tables that are shown in a form of their own

# facet -> what a reply is called that has it, and one that has not
FACETS = {
    "stopped": ("stops", "cut off"),
    "in_language": ("in language", "other language"),
    "keeps_format": ("keeps format", "breaks format"),
}


@dataclass(frozen=True)
class Plot:
    """A chart of the training's metrics: those whose names begin and end so."""

    title: str
    unit: str
    begin: str
    end: str = ""
    from_zero: bool = False
    may_be_log: bool = False
    share: bool = False
    aside: bool = False  # of the machine rather than the model

    def holds(self, name: str) -> bool:
        """Whether a metric belongs into this chart."""
        return name.startswith(self.begin) and name.endswith(self.end)

    def line_name(self, name: str) -> str:
        """What a metric is called in this chart."""
        return name.removeprefix(self.begin).removesuffix(self.end).strip("/_").replace("_", " ")


PLOTS = (
    Plot("Loss", "nats per token", "train/loss", may_be_log=True),
    Plot("Held-out bits per byte", "bits per byte; dashed: the base with its own tokenizer", "valid/", "/bits_per_byte",
         may_be_log=True),
    Plot("Held-out loss", "nats per token; not comparable across tokenizers", "valid/", "/loss"),
    Plot("Gradient norm", "before clipping", "train/gradient_norm", may_be_log=True),
    Plot("Learning rate", "", "train/learning_rate", from_zero=True),
    Plot("Throughput", "tokens per second", "train/tokens_per_second", from_zero=True),
    Plot("MFU", "share of the device's peak", "train/mfu", from_zero=True, share=True, aside=True),
    Plot("Time of a step", "s, over the processes", "train/step_seconds_", from_zero=True, aside=True),
    Plot("Peak memory", "GB, of the process with most", "train/peak_memory_gb", from_zero=True, aside=True),
    Plot("Waiting for data", "share of the time", "train/data_wait_share", from_zero=True, share=True, aside=True),
    Plot("Stalled by checkpoints", "s between two rows", "train/checkpoint_stall_seconds", from_zero=True, aside=True),
)  # fmt: skip


@dataclass(frozen=True)
class Key:
    """A line of a legend."""

    name: str
    colour: str
    newest: str = ""
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """One chart, drawn over each axis that there are values for."""

    title: str
    unit: str
    keys: list[Key]
    drawings: dict[str, Markup]  # axis -> SVG
    notes: list[str] = field(default_factory=list)
    aside: bool = False


@dataclass(frozen=True)
class Question:
    """One prompt and what every model replied."""

    prompt: str
    replies: list[dict[str, Cell]]


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


class Palette:
    """A class of the style sheet for everything that has a colour of its own."""

    def __init__(self, view: RunView) -> None:
        rows = view.log("evaluation").tables.get("eval/scores", Table([], [])).rows
        further = [name for name in dict.fromkeys(str(row[0]) for row in rows) if name not in MODELS]
        self._models = {name: f"k-{name}" for name in MODELS}
        self._models |= {name: f"k-m{place % FURTHER_MODELS}" for place, name in enumerate(further)}
        sources = settings(view).get("corpus", {}).get("sources", [])
        self._languages = {name: place for place, name in enumerate(dict.fromkeys(one["language"] for one in sources))}

    def model(self, name: str) -> str:
        """Of a model."""
        return self._models.get(name, "k-n0")

    def language(self, name: str) -> str:
        """Of a language."""
        place = self._languages.setdefault(name, len(self._languages))
        return f"k-l{place % LANGUAGE_COLOURS}"


def render_page(view: RunView, now: float) -> str:
    """The page, as of the time `now`."""
    evaluation, palette = view.log("evaluation"), Palette(view)
    return _template().render(
        view=view,
        written=time.strftime("%Y-%m-%d %H:%M", time.localtime(now)),
        recipe=settings(view),
        group=next((stage.log.run.get("group") for stage in view.stages if stage.log.run), ""),
        verdict=verdict(view, now),
        progress=progress(view),
        strip=strip(view),
        tiles=tiles(view),
        alerts=alerts(view),
        notices=[
            (_clock(float(alert["time"])), alert["title"], alert["text"])
            for stage in view.stages
            for alert in stage.log.alerts
            if is_notice(stage, alert)
        ],
        artifacts=[
            (stage.name, "reads" if one.used else "leaves", one.kind, one.name, one.uri, one.digest)
            for stage in view.stages
            for one in stage.log.artifacts
        ],
        models=[(name, palette.model(name)) for name in _models(evaluation)],
        palette=palette,
        bars=score_charts(evaluation, palette),
        charts=training_charts(view.log("training"), palette),
        questions=questions(evaluation),
        continuations=continuations(view.log("training")),
        sections=[section_of(stage, palette) for stage in view.stages],
        origins=origins(view),
        settings=json.dumps(settings(view), indent=2, ensure_ascii=False),
        wide_bars=len(_models(evaluation)) * len(_languages(evaluation)) > NARROW_BARS,
        shown_prompts=SHOWN_PROMPTS, most_prompts=MOST_PROMPTS, most_rows=MOST_ROWS,
    )  # fmt: skip


def alerts(view: RunView) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """(stage, title, [(time, text), ...]) of every matter, the newest first."""
    return [
        (matter.stage, matter.title, [(_clock(when), text) for when, text in reversed(matter.said)])
        for matter in matters(view)
    ]


def _clock(when: float) -> str:
    """Month, day and time here; nothing for what was not noted."""
    if not when:
        return ""
    return time.strftime("%m-%d %H:%M:%S", time.localtime(when))


def _models(log: StageLog) -> list[str]:
    table = log.tables.get("eval/scores")
    return list(dict.fromkeys(str(row[0]) for row in table.rows)) if table else []


def _languages(log: StageLog) -> list[str]:
    return list(dict.fromkeys(language for _, _, language in scores_of(log)))


def score_charts(log: StageLog, palette: Palette) -> list[Chart]:
    """A chart per figure of an evaluation: groups of languages, a bar per model."""
    table = log.tables.get("eval/scores")
    rows = [dict(zip(table.columns, cells, strict=True)) for cells in table.rows] if table else []
    known = {}
    for row in rows:
        numbers = [value for name in ("value", "low", "high") if isinstance(value := row[name], int | float)]
        if len(numbers) == 3 and all(map(math.isfinite, numbers)):
            known[str(row["figure"]), str(row["model"]), str(row["language"])] = Bar(*numbers)
    charts, figures = [], figures_of(log)
    for figure in sorted({figure for figure, _, _ in known}, key=lambda name: [*figures, name].index(name)):
        title, unit, share = figures.get(figure, (figure, "", False))
        languages = list(dict.fromkeys(language for one, _, language in known if one == figure))
        series = [
            Series(name, [known.get((figure, name, language)) for language in languages], palette.model(name))
            for name in _models(log)
        ]
        size = WIDE if len(languages) * len(series) > NARROW_BARS else NARROW
        charts.append(Chart(title, unit, [], {"bars": Markup(draw_bars(title, languages, series, share, size))}))
    return charts


def training_charts(log: StageLog, palette: Palette) -> list[Chart]:
    """The training curves: the known ones, then every other metric that is not constant."""
    names = [name for name in dict.fromkeys(name for row in log.rows for name in row) if name != "time"]
    plots = list(PLOTS)
    for name in names:
        values = [row[name] for row in log.rows if name in row]
        if name not in (STEP, *AXES.values(), "train/bytes") and not any(plot.holds(name) for plot in plots):
            plots += [Plot(name, "", name, aside=True)] if len(set(values)) > 1 else []
    charts = [_training_chart(plot, log, [name for name in names if plot.holds(name)], palette) for plot in plots]
    return [chart for chart in charts if chart.drawings]


def _training_chart(plot: Plot, log: StageLog, names: Sequence[str], palette: Palette) -> Chart:
    lines = {name: _line_form(plot, name, place, palette) for place, name in enumerate(names)}
    drawings, notes, newest = {}, [], {name: log.series(name)[-1][1] for name in names if log.series(name)}
    for label, axis in AXES.items():
        drawn = [Line(one.name, log.series(name, by=axis), one.colour, one.dashed) for name, one in lines.items()]
        form = Form(label, plot.from_zero, plot.may_be_log, plot.share)
        drawing = draw_chart(plot.title, [line for line in drawn if line.points], form)
        if drawing:
            drawings[label] = Markup(drawing)
        if label == "step":
            notes = _notes(drawn, form)
    form_y = percent if plot.share else number
    keys = [
        Key(one.name, one.colour, form_y(newest[name]), one.dashed) for name, one in lines.items() if name in newest
    ]
    return Chart(plot.title, plot.unit, keys, drawings, notes, plot.aside)


def _line_form(plot: Plot, name: str, place: int, palette: Palette) -> Key:
    if name.startswith("valid/"):
        language = name.split("/")[1]
        of_base = language.endswith("_base")
        language = language.removesuffix("_base")
        return Key(f"{language}, base" if of_base else language, palette.language(language), dashed=of_base)
    if plot.begin == "train/learning_rate":
        return Key(plot.line_name(name) or "layers", f"k-n{place % PLAIN_COLOURS}")
    return Key(plot.line_name(name) or plot.title.lower(), f"k-n{place % PLAIN_COLOURS}")


def _notes(lines: Sequence[Line], form: Form) -> list[str]:
    notes = ["logarithmic scale"] if is_logarithmic(lines, form) else []
    for line in lines:
        odd = sum(not math.isfinite(y) for _, y in line.points)
        if odd:
            notes.append(f"{line.name}: {odd:,} of {len(line.points):,} values are not finite")
    longest = max((len(line.points) for line in lines), default=0)
    if longest > MOST_POINTS:
        notes.append(f"extremes of {longest:,} rows")
    return notes


def section_of(stage: StageView, palette: Palette) -> StageSection:
    """A stage's own part of the page."""
    draw = {"tokenizer": tokenizer_charts, "data": data_charts, "merge": merge_charts}.get(stage.name)
    charts = draw(stage.log, palette) if draw else []
    tables = {name: table for name, table in stage.log.tables.items() if name not in OWN_PLACE}
    drawn = bool(charts) or stage.name in ("training", "evaluation")
    shown = {f"{model}/{language}/{figure}" for figure, model, language in scores_of(stage.log)}
    small = [name for name, table in tables.items() if len(table.rows) <= OPEN_ROWS]
    return StageSection(
        stage,
        charts,
        tables,
        [name for name in small if not drawn or name.endswith(("examples", "not_run"))],
        {name: data_uri(path) for name, path in stage.log.images.items()},
        _metrics(stage.log, shown),
        _results(stage, shown),
        {name: _content(path) for name, path in stage.log.files.items()},
    )


def _content(path: Path) -> str:
    """A logged file's text, or its beginning."""
    text = path.read_text(encoding="utf-8", errors="replace")
    over = len(text) - FILE_CHARACTERS
    return f"{text[:FILE_CHARACTERS]}\n… ({over:,} more characters in {path})" if over > 0 else text


def _metrics(log: StageLog, shown: Collection[str]) -> list[tuple[str, int, float, float, float]]:
    """Of every metric not `shown` before: how often it was logged, its newest, smallest and largest value."""
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
    return [(name, value) for name, value in _spread({**summary, **stage.results}) if name not in shown]


def _spread(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _spread(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", ", ".join(map(str, value)) or None if isinstance(value, list) else value


def tokenizer_charts(log: StageLog, palette: Palette) -> list[Chart]:
    """Tokens per character before and after, and what each further piece brings."""
    charts = []
    fertility = _columns(log, "tokenizer/fertility", "language", "tok/char base", "tok/char new")
    if fertility:
        languages = [str(row[0]) for row in fertility]
        series = [
            Series(name, [Bar(*[float(row[place] or 0)] * 3) for row in fertility], palette.model(colour))
            for place, name, colour in ((1, "base", "base"), (2, "extended", "cpt"))
        ]
        drawing = Markup(draw_bars("Tokens per character", languages, series, size=WIDE))
        keys = [Key(one.name, one.colour) for one in series]
        charts.append(Chart("Tokens per character", "of held-out text; lower is better", keys, {"bars": drawing}))
    curves: dict[str, list[tuple[float, float]]] = {}
    for language, size, value in _columns(log, "tokenizer/gain curve", "language", "new pieces", "tok/char"):
        curves.setdefault(str(language), []).append((float(size or 0), float(value or 0)))
    lines = [Line(name, points, palette.language(name)) for name, points in curves.items()]
    drawing = Markup(draw_chart("Gain", lines, Form("new pieces", from_zero=True)))
    if drawing:
        keys = [Key(line.name, line.colour, short(line.points[-1][1])) for line in lines]
        charts.append(Chart("What each further piece brings", "tokens per character", keys, {"curve": drawing}))
    return charts


def data_charts(log: StageLog, palette: Palette) -> list[Chart]:
    """How long the documents of each source are."""
    rows = _columns(log, "data/document lengths", "source", "log2 of tokens", "share of documents")
    curves: dict[str, dict[int, float]] = {}
    for source, power, share in rows:
        curves.setdefault(str(source), {})[int(power or 0)] = float(share or 0)
    powers = sorted({power for curve in curves.values() for power in curve})
    if not powers:
        return []
    sizes, languages, lines = range(powers[0], powers[-1] + 1), set(), []
    for name, curve in curves.items():
        points = [(float(place), curve.get(power, 0.0)) for place, power in enumerate(sizes)]
        colour = palette.language(name.partition(":")[0])  # a source is named LANGUAGE:FILE
        lines.append(Line(name, points, colour, dashed=colour in languages))
        languages.add(colour)
    form = Form("tokens, from", from_zero=True, share=True, categories=[number(2**power) for power in sizes])
    drawing = Markup(draw_chart("Document lengths", lines, form))
    keys = [Key(line.name, line.colour, dashed=line.dashed) for line in lines]
    return [Chart("Document lengths", "share of a source's documents", keys, {"curve": drawing})]


def merge_charts(log: StageLog, palette: Palette) -> list[Chart]:
    """Norms and cosine by layer; parts that are no layer stand apart."""
    names = {"vector / base": "chat vector", "cpt change / base": "CPT change", "cosine": "cosine"}
    rows = _columns(log, "merge/layers", "part", *names)
    parts = [str(row[0]) for row in rows]
    lines = {}
    for place, (column, name) in enumerate(names.items(), start=1):
        points = [(float(x), math.nan if row[place] is None else float(str(row[place]))) for x, row in enumerate(rows)]
        colour = {"vector / base": palette.model("chat"), "cpt change / base": palette.model("cpt")}.get(column, "k-n0")
        lines[column] = Line(name, list(_apart(points, parts)), colour)
    charts = []
    for title, unit, columns, from_zero in (
        ("Length of the changes", "share of the base's norm", ["vector / base", "cpt change / base"], True),
        ("Cosine", "between chat vector and CPT change", ["cosine"], False),
    ):
        drawn = [lines[column] for column in columns]
        drawing = draw_chart(title, drawn, Form("layer", from_zero=from_zero, categories=parts))
        if drawing:
            keys = [Key(line.name, line.colour) for line in drawn]
            charts.append(Chart(title, unit, keys, {"curve": Markup(drawing)}))
    return charts


def _apart(points: Sequence[tuple[float, float]], parts: Sequence[str]) -> Iterator[tuple[float, float]]:
    """With gaps around what is no numbered layer."""
    for place, point in enumerate(points):
        if place and not (parts[place].isdigit() and parts[place - 1].isdigit()):
            yield point[0] - 0.5, math.nan
        yield point


def _columns(log: StageLog, name: str, *columns: str) -> list[list[Cell]]:
    """The named columns of a table; nothing if it or one of them is not there."""
    table = log.tables.get(name)
    if table is None or not set(columns) <= set(table.columns):
        return []
    places = [table.columns.index(column) for column in columns]
    return [[row[place] for place in places] for row in table.rows]


def questions(log: StageLog) -> dict[str, list[Question]]:
    """By language, the prompts with every model's reply side by side."""
    table = log.tables.get("eval/samples")
    found: dict[str, dict[str, list[dict[str, Cell]]]] = {}
    for cells in table.rows if table else []:
        row = dict(zip(table.columns, cells, strict=True)) if table else {}
        prompts = found.setdefault(str(row["language"]), {})
        if str(row["prompt"]) in prompts or len(prompts) < MOST_PROMPTS:
            replies = prompts.setdefault(str(row["prompt"]), [])
            if all(reply["model"] != row["model"] for reply in replies):  # the same prompt may be asked twice
                replies.append({**row, "reply": _cut(str(row["reply"]))})
    return {
        language: [Question(prompt, replies) for prompt, replies in prompts.items()]
        for language, prompts in found.items()
    }


def _cut(text: str) -> str:
    """A reply as it is shown: line breaks before its first word as signs, and no longer than it may be."""
    words = text.lstrip("\n")
    text, over = "⏎" * (len(text) - len(words)) + words, len(words) - MOST_CHARACTERS
    return f"{text[:MOST_CHARACTERS]} … ({over:,} more characters)" if over > 0 else text


def continuations(log: StageLog) -> list[tuple[str, str, list[tuple[Cell, str]]]]:
    """(language, prompt, [(step, continuation), ...]) of held-out text; of many steps, evenly spread ones."""
    found: dict[tuple[str, str], list[tuple[Cell, str]]] = {}
    for step, language, prompt, text in _columns(
        log, "train/continuations", "step", "language", "prompt", "continuation"
    ):
        found.setdefault((str(language), str(prompt)), []).append((step, _cut(str(text))))
    return [(*names, _spread_evenly(said)) for names, said in found.items()]


def _spread_evenly(said: list[tuple[Cell, str]]) -> list[tuple[Cell, str]]:
    """The first, the last, and some in between."""
    if len(said) <= SHOWN_STEPS:
        return said
    return [said[round(place * (len(said) - 1) / (SHOWN_STEPS - 1))] for place in range(SHOWN_STEPS)]


def settings(view: RunView) -> Mapping[str, Any]:
    """The recipe, as the newest stage logged it."""
    for stage in reversed(view.stages):
        found: dict[str, Any] = stage.log.run.get("settings", {})
        if found:
            return dict(found.get("recipe", found))
    return {}


def data_uri(path: Path) -> str:
    """A picture as text."""
    return f"data:image/{path.suffix[1:]};base64,{base64.b64encode(path.read_bytes()).decode()}"


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        number=number, duration=duration, facets=_facets, lang=_lang, numeric=_numeric, clock=_clock, counted=_counted
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def origins(view: RunView) -> list[tuple[str, str]]:
    """Of every stage all that is known of where its result comes from, as JSON; the recipe is shown once, apart."""
    found = []
    for stage in view.stages:
        run = dict(stage.log.run)
        run["settings"] = {name: value for name, value in run.get("settings", {}).items() if name != "recipe"}
        recorded = {"inputs": stage.record.inputs, "versions": stage.record.versions} if stage.record else {}
        found.append((stage.name, json.dumps({**run, **recorded}, indent=2, ensure_ascii=False)))
    return found


def _lang(tag: str) -> str:
    """A language's tag for HTML: browsers choose the glyphs of Chinese characters by it."""
    return tag.replace("_", "-")


def _numeric(table: Table) -> list[bool]:
    """Which columns hold numbers only."""
    kinds = [{type(row[place]) for row in table.rows} - {type(None)} for place in range(len(table.columns))]
    return [bool(kind) and kind <= {int, float} for kind in kinds]


def _counted(reply: Mapping[str, Cell]) -> str:
    """How long a reply is and how much of it repeats itself."""
    parts = [f"{number(reply['tokens'])} tokens"] if "tokens" in reply else []
    repetition = reply.get("repetition")
    parts += [f"{100 * repetition:.0f} % repeated"] if isinstance(repetition, float) else []
    return ", ".join(parts)


def _facets(reply: Mapping[str, Cell]) -> list[tuple[str, bool]]:
    """The yes-or-no facets of a reply, in words; of several replies of a dialogue each has to have it."""
    held = {facet: reply[facet] == 1 for facet in FACETS if facet in reply}
    return [(words[not held[facet]], held[facet]) for facet, words in FACETS.items() if facet in held]
