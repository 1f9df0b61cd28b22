"""The charts of the report's page: which there are, what they are called, and in which colour what is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from cpt_merge.report.bars import NARROW, WIDE, Bar, Series, draw_bars
from cpt_merge.report.curves import (
    MOST_POINTS,
    Form,
    Line,
    draw_chart,
    is_logarithmic,
    percent,
    short,
)
from cpt_merge.report.headline import scores_of
from cpt_merge.report.run_view import RunView, columns_of, metrics_of, number, previewed_metrics
from cpt_merge.tracking import STEP, StageLog

AXES = {"step": STEP, "tokens": "train/tokens"}  # what the curves can be drawn over
MODELS = ("base", "chat", "cpt", "merged")  # with a colour of their own, the same everywhere
FURTHER_MODELS, LANGUAGE_COLOURS, PLAIN_COLOURS = 3, 6, 2
NARROW_BARS = 20  # more than these in one chart need a wider one
OPEN_PREVIEWS = 2  # charts of the preview that are not folded
SWEPT = ["language", "ratio"]  # how the columns of a sweep's curve begin


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
    Plot("Time of a preview", "s", "preview/seconds", from_zero=True, aside=True),
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


class Palette:
    """A class of the style sheet for everything that has a colour of its own."""

    def __init__(self, view: RunView) -> None:
        scores = columns_of(view.log("evaluation"), "eval/scores", "model")
        names = dict.fromkeys(str(name) for (name,) in scores)
        further = [name for name in names if name not in MODELS]
        self._models = {name: f"k-{name}" for name in MODELS}
        self._models |= {name: f"k-m{place % FURTHER_MODELS}" for place, name in enumerate(further)}
        sources = settings(view).get("corpus", {}).get("sources", [])
        self._languages = {
            name: place
            for place, name in enumerate(dict.fromkeys(one["language"] for one in sources))
        }

    def model(self, name: str) -> str:
        """Of a model."""
        return self._models.get(name, "k-n0")

    def language(self, name: str) -> str:
        """Of a language."""
        place = self._languages.setdefault(name, len(self._languages))
        return f"k-l{place % LANGUAGE_COLOURS}"


def settings(view: RunView) -> Mapping[str, Any]:
    """The recipe, as the newest stage logged it."""
    for stage in reversed(view.stages):
        found: dict[str, Any] = stage.log.run.get("settings", {})
        if found:
            return dict(found.get("recipe", found))
    return {}


def models_of(log: StageLog) -> list[str]:
    """The models of an evaluation."""
    table = log.tables.get("eval/scores")
    return list(dict.fromkeys(str(row[0]) for row in table.rows)) if table else []


def languages_of(log: StageLog) -> list[str]:
    """The languages of an evaluation."""
    return list(dict.fromkeys(language for _, _, language in scores_of(log)))


def score_charts(log: StageLog, palette: Palette) -> list[Chart]:
    """A chart per metric of an evaluation: groups of languages, a bar per model."""
    table = log.tables.get("eval/scores")
    rows = [dict(zip(table.columns, cells, strict=True)) for cells in table.rows] if table else []
    known = {}
    for row in rows:
        numbers = [
            value
            for name in ("value", "low", "high")
            if isinstance(value := row[name], int | float)
        ]
        if len(numbers) == 3 and all(map(math.isfinite, numbers)):
            known[str(row["metric"]), str(row["model"]), str(row["language"])] = Bar(*numbers)
    charts, metrics = [], metrics_of(log)
    for metric in sorted(
        {metric for metric, _, _ in known}, key=lambda name: [*metrics, name].index(name)
    ):
        title, unit, share = metrics.get(metric, (metric, "", False))
        languages = list(dict.fromkeys(language for one, _, language in known if one == metric))
        series = [
            Series(
                name,
                [known.get((metric, name, language)) for language in languages],
                palette.model(name),
            )
            for name in models_of(log)
        ]
        size = WIDE if len(languages) * len(series) > NARROW_BARS else NARROW
        charts.append(
            Chart(
                title, unit, [], {"bars": Markup(draw_bars(title, languages, series, share, size))}
            )
        )
    return charts


def training_charts(log: StageLog, palette: Palette) -> list[Chart]:
    """The training curves: the known ones, then every other metric that is not constant; previews are apart."""
    of_previews = {name for names in previewed_metrics(log).values() for name in names.values()}
    names = [
        name for name in dict.fromkeys(name for row in log.rows for name in row) if name != "time"
    ]
    plots = list(PLOTS)
    for name in names:
        values = [row[name] for row in log.rows if name in row]
        apart = name in (STEP, *AXES.values(), "train/bytes") or name in of_previews
        if not apart and not any(plot.holds(name) for plot in plots):
            plots += [Plot(name, "", name, aside=True)] if len(set(values)) > 1 else []
    charts = [
        _training_chart(plot, log, [name for name in names if plot.holds(name)], palette)
        for plot in plots
    ]
    return [chart for chart in charts if chart.drawings]


def preview_charts(
    log: StageLog, about: Mapping[str, tuple[str, str, bool]], palette: Palette
) -> list[Chart]:
    """What the chat model was at each preview, a chart per metric, a line per language; `about` is `metrics_of`."""
    found = previewed_metrics(log)
    charts = []
    for place, metric in enumerate(found):
        title, unit, share = about.get(metric, (metric.replace("_", " ").capitalize(), "", True))
        plot = Plot(
            title,
            unit,
            "preview/",
            f"/{metric}",
            from_zero=True,
            share=share,
            aside=place >= OPEN_PREVIEWS,
        )
        charts.append(_training_chart(plot, log, list(found[metric].values()), palette))
    return [chart for chart in charts if chart.drawings]


def _training_chart(plot: Plot, log: StageLog, names: Sequence[str], palette: Palette) -> Chart:
    lines = {name: _line_form(plot, name, place, palette) for place, name in enumerate(names)}
    drawings, notes, newest = (
        {},
        [],
        {name: log.series(name)[-1][1] for name in names if log.series(name)},
    )
    for label, axis in AXES.items():
        drawn = [
            Line(one.name, log.series(name, by=axis), one.colour, one.dashed)
            for name, one in lines.items()
        ]
        form = Form(label, plot.from_zero, plot.may_be_log, plot.share)
        drawing = draw_chart(plot.title, [line for line in drawn if line.points], form)
        if drawing:
            drawings[label] = Markup(drawing)
        if label == "step":
            notes = _notes(drawn, form)
    form_y = percent if plot.share else number
    keys = [
        Key(one.name, one.colour, form_y(newest[name]), one.dashed)
        for name, one in lines.items()
        if name in newest
    ]
    return Chart(plot.title, plot.unit, keys, drawings, notes, plot.aside)


def _line_form(plot: Plot, name: str, place: int, palette: Palette) -> Key:
    if name.startswith(("valid/", "preview/")) and name.count("/") == 2:
        language = name.split("/")[1]
        of_base = language.endswith("_base")
        language = language.removesuffix("_base")
        return Key(
            f"{language}, base" if of_base else language, palette.language(language), dashed=of_base
        )
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


def tokenizer_charts(log: StageLog, palette: Palette) -> list[Chart]:
    """Tokens per character before and after, and what each further piece brings."""
    charts = []
    fertility = columns_of(log, "tokenizer/fertility", "language", "tok/char base", "tok/char new")
    if fertility:
        languages = [str(row[0]) for row in fertility]
        series = [
            Series(
                name,
                [Bar(*[float(row[place] or 0)] * 3) for row in fertility],
                palette.model(colour),
            )
            for place, name, colour in ((1, "base", "base"), (2, "extended", "cpt"))
        ]
        drawing = Markup(draw_bars("Tokens per character", languages, series, size=WIDE))
        keys = [Key(one.name, one.colour) for one in series]
        charts.append(
            Chart(
                "Tokens per character", "of held-out text; lower is better", keys, {"bars": drawing}
            )
        )
    curves: dict[str, list[tuple[float, float]]] = {}
    for language, size, value in columns_of(
        log, "tokenizer/gain curve", "language", "new pieces", "tok/char"
    ):
        curves.setdefault(str(language), []).append((float(size or 0), float(value or 0)))
    lines = [Line(name, points, palette.language(name)) for name, points in curves.items()]
    drawing = Markup(draw_chart("Gain", lines, Form("new pieces", from_zero=True)))
    if drawing:
        keys = [Key(line.name, line.colour, short(line.points[-1][1])) for line in lines]
        charts.append(
            Chart(
                "What each further piece brings", "tokens per character", keys, {"curve": drawing}
            )
        )
    return charts


def data_charts(log: StageLog, palette: Palette) -> list[Chart]:
    """How long the documents of each source are."""
    rows = columns_of(
        log, "data/document lengths", "source", "log2 of tokens", "share of documents"
    )
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
    form = Form(
        "tokens, from", from_zero=True, share=True, categories=[number(2**power) for power in sizes]
    )
    drawing = Markup(draw_chart("Document lengths", lines, form))
    keys = [Key(line.name, line.colour, dashed=line.dashed) for line in lines]
    return [Chart("Document lengths", "share of a source's documents", keys, {"curve": drawing})]


def merge_charts(log: StageLog, palette: Palette) -> list[Chart]:
    """Norms and cosine by layer; parts that are no layer stand apart."""
    names = {"vector / base": "chat vector", "cpt change / base": "CPT change", "cosine": "cosine"}
    rows = columns_of(log, "merge/layers", "part", *names)
    parts = [str(row[0]) for row in rows]
    lines = {}
    for place, (column, name) in enumerate(names.items(), start=1):
        points = [
            (float(x), math.nan if row[place] is None else float(str(row[place])))
            for x, row in enumerate(rows)
        ]
        colour = {
            "vector / base": palette.model("chat"),
            "cpt change / base": palette.model("cpt"),
        }.get(column, "k-n0")
        lines[column] = Line(name, list(_apart(points, parts)), colour)
    charts = []
    for title, unit, columns, from_zero in (
        (
            "Length of the changes",
            "share of the base's norm",
            ["vector / base", "cpt change / base"],
            True,
        ),
        ("Cosine", "between chat vector and CPT change", ["cosine"], False),
    ):
        drawn = [lines[column] for column in columns]
        drawing = draw_chart(title, drawn, Form("layer", from_zero=from_zero, categories=parts))
        if drawing:
            keys = [Key(line.name, line.colour) for line in drawn]
            charts.append(Chart(title, unit, keys, {"curve": Markup(drawing)}))
    return charts


def _apart(
    points: Sequence[tuple[float, float]], parts: Sequence[str]
) -> Iterator[tuple[float, float]]:
    """With gaps around what is no numbered layer."""
    for place, point in enumerate(points):
        if place and not (parts[place].isdigit() and parts[place - 1].isdigit()):
            yield point[0] - 0.5, math.nan
        yield point


def sweep_charts(
    log: StageLog, about: Mapping[str, tuple[str, str, bool]], palette: Palette
) -> list[Chart]:
    """What a sweep measured over the ratio, a chart per metric, a line per language, and what it recommends."""
    recommended = log.summary.get("sweep/recommended_ratio")
    names = [
        name.removeprefix("sweep/")
        for name, table in log.tables.items()
        if table.columns[:2] == SWEPT
    ]
    charts = []
    for metric in sorted(names, key=lambda name: [*about, name].index(name)):
        title, unit, share = about.get(metric, (metric.replace("_", " ").capitalize(), "", False))
        curves: dict[str, list[tuple[float, float]]] = {}
        for language, ratio, value in columns_of(log, f"sweep/{metric}", *SWEPT, metric):
            if isinstance(ratio, int | float) and isinstance(value, int | float):
                curves.setdefault(str(language), []).append((float(ratio), float(value)))
        lines = [Line(name, points, palette.language(name)) for name, points in curves.items()]
        drawing = draw_chart(
            title, lines, Form("ratio", from_zero=share, share=share, mark=recommended)
        )
        if drawing:
            keys = [Key(line.name, line.colour) for line in lines]
            notes = [] if recommended is None else [f"dashed: {number(recommended)}, recommended"]
            charts.append(Chart(title, unit, keys, {"curve": Markup(drawing)}, notes))
    return charts
