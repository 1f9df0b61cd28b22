"""The charts of the report's page: which there are, their titles and their colours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from markupsafe import Markup

from cpt_merge.core.curves import (
    MOST_POINTS,
    ChartForm,
    Curve,
    draw_curves,
    is_logarithmic,
    percent,
    short,
)
from cpt_merge.core.progress import counted
from cpt_merge.report.bars import NARROW, WIDE, Bar, BarSeries, draw_bars
from cpt_merge.report.view import (
    MetricText,
    RunView,
    metric_text,
    metrics_of,
    number,
    previewed_metrics,
    scores_of,
)
from cpt_merge.tracking import STEP, Cell, StageLog

T = TypeVar("T")
AXES = {"step": STEP, "tokens": "train/tokens"}  # what the curves can be drawn over
MODELS = ("base", "chat", "cpt", "merged")  # models with a fixed colour
FURTHER_MODELS, LANGUAGE_COLOURS, PLAIN_COLOURS = 3, 6, 2
NARROW_BARS = 20  # more bars than these in one chart need a wider one
OPEN_PREVIEWS = 2  # charts of the preview that are not folded
SWEPT = ["language", "ratio"]  # the first columns of a sweep's curve


@dataclass(frozen=True)
class Plot:
    """A chart of training metrics: of those whose names begin with `begin` and end with `end`."""

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


def _machine(title: str, unit: str, begin: str, share: bool = False) -> Plot:
    return Plot(title, unit, begin, from_zero=True, share=share, aside=True)


PLOTS = (
    Plot("Loss", "nats per token", "train/loss", may_be_log=True),
    Plot(
        "Validation bits per byte",
        "bits per byte; dashed: the base with its own tokenizer",
        "valid/",
        "/bits_per_byte",
        may_be_log=True,
    ),
    Plot("Held-out loss", "nats per token; not comparable across tokenizers", "valid/", "/loss"),
    Plot("Gradient norm", "before clipping", "train/gradient_norm", may_be_log=True),
    Plot("Learning rate", "", "train/learning_rate", from_zero=True),
    Plot("Throughput", "tokens per second", "train/tokens_per_second", from_zero=True),
    _machine("MFU", "share of the device's peak", "train/mfu", share=True),
    _machine("Time of a step", "s, over the processes", "train/step_seconds_"),
    _machine("Peak memory", "GB, of the process with most", "train/peak_memory_gb"),
    _machine("Waiting for data", "share of the time", "train/data_wait_share", share=True),
    _machine("Stalled by checkpoints", "s between two rows", "train/checkpoint_stall_seconds"),
    _machine("Time of a preview", "s", "preview/seconds"),
)


@dataclass(frozen=True)
class LegendKey:
    """One entry of a legend."""

    name: str
    colour: str
    newest: str = ""
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """One chart, drawn over each axis for which there are values."""

    title: str
    unit: str
    keys: list[LegendKey]
    drawings: dict[str, Markup]  # axis -> SVG
    notes: list[str] = field(default_factory=list)
    aside: bool = False


class Palette:
    """Classes of the style sheet for the models and languages."""

    def __init__(self, view: RunView) -> None:
        further = [name for name in models_of(view.log("evaluation")) if name not in MODELS]
        self._models = {name: f"k-{name}" for name in MODELS}
        self._models |= {name: f"k-m{place % FURTHER_MODELS}" for place, name in enumerate(further)}
        sources = view.recipe.get("corpus", {}).get("sources", [])
        languages = dict.fromkeys(source["language"] for source in sources)
        self._languages = {name: place for place, name in enumerate(languages)}

    def model(self, name: str) -> str:
        """The class of a model."""
        return self._models.get(name, "k-n0")

    def language(self, name: str) -> str:
        """The class of a language."""
        place = self._languages.setdefault(name, len(self._languages))
        return f"k-l{place % LANGUAGE_COLOURS}"

    def curves(self, points: Iterable[tuple[Cell, Cell, Cell]]) -> list[Curve]:
        """A curve for each language of (language, x, y), without values that are not numbers."""
        curves: dict[str, list[tuple[float, float]]] = {}
        for language, x, y in points:
            if isinstance(x, int | float) and isinstance(y, int | float):
                curves.setdefault(str(language), []).append((float(x), float(y)))
        return [Curve(name, found, self.language(name)) for name, found in curves.items()]


def models_of(log: StageLog) -> list[str]:
    """The models of an evaluation."""
    return list(dict.fromkeys(str(row["model"]) for row in log.records("eval/scores")))


def has_wide_bars(log: StageLog) -> bool:
    """Whether an evaluation's charts need two columns instead of three."""
    languages = {language for _, _, language in scores_of(log)}
    return len(models_of(log)) * len(languages) > NARROW_BARS


def score_charts(log: StageLog, palette: Palette) -> list[Chart]:
    """A chart for each metric of an evaluation: groups of languages, a bar for each model."""
    bars: dict[str, dict[tuple[str, str], Bar]] = {}  # metric -> (model, language) -> bar
    for row in log.records("eval/scores"):
        numbers = [x for x in (row["value"], row["low"], row["high"]) if isinstance(x, int | float)]
        if len(numbers) == 3 and all(map(math.isfinite, numbers)):
            names = str(row["model"]), str(row["language"])
            bars.setdefault(str(row["metric"]), {})[names] = Bar(*numbers)
    charts, texts = [], metrics_of(log)
    for metric, found in _in_order(bars, texts):
        text = metric_text(texts, metric)
        languages = list(dict.fromkeys(language for _, language in found))
        series = [
            BarSeries(name, [found.get((name, one)) for one in languages], palette.model(name))
            for name in models_of(log)
        ]
        size = WIDE if len(languages) * len(series) > NARROW_BARS else NARROW
        clip = math.inf if text.is_share else _clip([bar.value for bar in found.values()])
        drawing = Markup(draw_bars(text.title, languages, series, text.is_share, size, clip))
        notes = ["bars with a gap are higher"] if clip < math.inf else []
        charts.append(Chart(text.title, text.meaning, [], {"bars": drawing}, notes=notes))
    return charts


def _clip(values: Sequence[float]) -> float:
    """Where bars are cut off so that the small ones can be told apart; inf if all are of a size."""
    least = min(value for value in values if value >= 0)
    return 3 * least if max(values) > 6 * least > 0 else math.inf


def training_charts(log: StageLog, palette: Palette) -> list[Chart]:
    """The training curves: the known ones, then every other metric that is not constant.

    Previews are apart.
    """
    of_previews = {name for names in previewed_metrics(log).values() for name in names.values()}
    plots = list(PLOTS)
    for name in log.metrics:
        apart = name in (*AXES.values(), "train/bytes") or name in of_previews
        if apart or any(plot.holds(name) for plot in plots):
            continue
        if len({row[name] for row in log.rows if name in row}) > 1:
            plots.append(Plot(name, "", name, aside=True))
    return _drawn(
        _training_chart(plot, log, [name for name in log.metrics if plot.holds(name)], palette)
        for plot in plots
    )


def preview_charts(log: StageLog, metrics: dict[str, MetricText], palette: Palette) -> list[Chart]:
    """How the chat model was at each preview: a chart for each metric, a line for each language."""
    charts = []
    for place, (metric, names) in enumerate(previewed_metrics(log).items()):
        text = metric_text(metrics, metric, is_share=True)
        aside = place >= OPEN_PREVIEWS
        plot = Plot(
            text.title, text.meaning, "preview/", f"/{metric}",
            from_zero=True, share=text.is_share, aside=aside,
        )  # fmt: skip
        charts.append(_training_chart(plot, log, list(names.values()), palette))
    return _drawn(charts)


def _training_chart(plot: Plot, log: StageLog, names: Sequence[str], palette: Palette) -> Chart:
    text = percent if plot.share else number
    keys = {name: _key(plot, name, place, palette) for place, name in enumerate(names)}
    drawings, notes, newest = {}, [], {}
    for label, axis in AXES.items():
        form = ChartForm(label, plot.from_zero, plot.may_be_log, plot.share)
        curves = [
            Curve(key.name, log.series(name, by=axis), key.colour, key.dashed)
            for name, key in keys.items()
        ]
        if drawing := draw_curves(plot.title, [curve for curve in curves if curve.points], form):
            drawings[label] = Markup(drawing)
        if axis == STEP:
            notes = _notes(curves, form)
            newest = {curve.name: text(curve.points[-1][1]) for curve in curves if curve.points}
    legend = [
        LegendKey(key.name, key.colour, newest[key.name], key.dashed)
        for key in keys.values()
        if key.name in newest
    ]
    return Chart(plot.title, plot.unit, legend, drawings, notes, plot.aside)


def _key(plot: Plot, name: str, place: int, palette: Palette) -> LegendKey:
    """Name and colour of a metric in a chart."""
    if name.startswith(("valid/", "preview/")) and name.count("/") == 2:
        language = name.split("/")[1]
        of_base = language.endswith("_base")
        language = language.removesuffix("_base")
        shown = f"{language}, base" if of_base else language
        return LegendKey(shown, palette.language(language), dashed=of_base)
    rest = name.removeprefix(plot.begin).removesuffix(plot.end).strip("/_").replace("_", " ")
    whole = "layers" if plot.begin == "train/learning_rate" else plot.title.lower()
    return LegendKey(rest or whole, f"k-n{place % PLAIN_COLOURS}")


def _notes(curves: Sequence[Curve], form: ChartForm) -> list[str]:
    notes = ["logarithmic scale"] if is_logarithmic(curves, form) else []
    for curve in curves:
        odd = sum(not math.isfinite(y) for _, y in curve.points)
        if odd:
            notes.append(
                f"{curve.name}: {odd:,} of {counted(len(curve.points), 'value')} not finite"
            )
    longest = max((len(curve.points) for curve in curves), default=0)
    if longest > MOST_POINTS:
        notes.append(f"extremes of {longest:,} rows")
    return notes


def tokenizer_charts(log: StageLog, palette: Palette) -> list[Chart]:
    """Tokens per character before and after, and what each further piece brings."""
    charts = []
    fertility = log.records("tokenizer/fertility")
    if fertility and "tok/char new" in fertility[0]:
        series = [
            BarSeries(
                name, [Bar.exact(row[f"tok/char {column}"]) for row in fertility], palette.model(of)
            )
            for name, column, of in (("base", "base", "base"), ("extended", "new", "cpt"))
        ]
        languages = [str(row["language"]) for row in fertility]
        title = "Tokens per character"
        drawing = Markup(draw_bars(title, languages, series, size=WIDE))
        keys = [LegendKey(one.name, one.colour) for one in series]
        charts.append(Chart(title, "of held-out text; lower is better", keys, {"bars": drawing}))
    curves = palette.curves(
        (row["language"], row["new pieces"], row["tok/char"])
        for row in log.records("tokenizer/gain curve")
    )
    keys = [LegendKey(one.name, one.colour, short(one.points[-1][1])) for one in curves]
    form, title = ChartForm("new pieces", from_zero=True), "What each further piece brings"
    charts.append(_curve_chart(title, "tokens per character", keys, curves, form))
    return _drawn(charts)


def data_charts(log: StageLog, palette: Palette) -> list[Chart]:
    """How long the documents of each source are."""
    shares: dict[str, dict[int, float]] = {}
    for row in log.records("data/document lengths"):
        of_source = shares.setdefault(str(row["source"]), {})
        of_source[int(row["log2 of tokens"] or 0)] = float(row["share of documents"] or 0)
    powers = {power for of_source in shares.values() for power in of_source}
    if not powers:
        return []
    sizes, colours, curves = range(min(powers), max(powers) + 1), set[str](), []
    for name, of_source in shares.items():
        points = [(float(place), of_source.get(power, 0.0)) for place, power in enumerate(sizes)]
        colour = palette.language(name.partition(":")[0])  # a source is named LANGUAGE:FILE
        curves.append(Curve(name, points, colour, dashed=colour in colours))
        colours.add(colour)
    labels = [number(2**power) for power in sizes]
    form = ChartForm("tokens, from", from_zero=True, share=True, categories=labels)
    keys = [LegendKey(curve.name, curve.colour, dashed=curve.dashed) for curve in curves]
    title, unit = "Document lengths", "share of a source's documents"
    return _drawn([_curve_chart(title, unit, keys, curves, form)])


def merge_charts(log: StageLog, palette: Palette) -> list[Chart]:
    """Norms and cosine by layer, with gaps around parts that are not layers."""
    rows = log.records("merge/layers")
    parts = [str(row["part"]) for row in rows]

    def curve(name: str, column: str, colour: str) -> Curve:
        values = [row[column] for row in rows]
        points = [
            (float(x), float(value) if isinstance(value, int | float) else math.nan)
            for x, value in enumerate(values)
        ]
        return Curve(name, list(_with_gaps(points, parts)), colour)

    lengths = [
        curve("chat vector", "vector / base", palette.model("chat")),
        curve("CPT change", "cpt change / base", palette.model("cpt")),
    ]
    cosine = [curve("cosine", "cosine", "k-n0")]
    between = "between chat vector and CPT change"
    return _drawn(
        _curve_chart(
            title, unit, [LegendKey(one.name, one.colour) for one in curves], curves,
            ChartForm("layer", from_zero=from_zero, categories=parts),
        )
        for title, unit, curves, from_zero in (
            ("Length of the changes", "share of the base's norm", lengths, True),
            ("Cosine", between, cosine, False),
        )
    )  # fmt: skip


def sweep_charts(log: StageLog, metrics: dict[str, MetricText], palette: Palette) -> list[Chart]:
    """What a sweep measured over the ratio: a chart for each metric, a line for each language."""
    recommended = log.summary.get("sweep/recommended_ratio")
    notes = [] if recommended is None else [f"dashed: {number(recommended)}, recommended"]
    tables = {
        name.removeprefix("sweep/"): table
        for name, table in log.tables.items()
        if table.columns[:2] == SWEPT
    }
    charts = []
    for metric, table in _in_order(tables, metrics):
        text = metric_text(metrics, metric)
        curves = palette.curves(
            (row["language"], row["ratio"], row.get(metric)) for row in table.records
        )
        keys = [LegendKey(curve.name, curve.colour) for curve in curves]
        form = ChartForm("ratio", text.is_share, share=text.is_share, mark=recommended)
        charts.append(_curve_chart(text.title, text.meaning, keys, curves, form, notes))
    return _drawn(charts)


def _in_order(values: dict[str, T], metrics: dict[str, MetricText]) -> list[tuple[str, T]]:
    """By metric: known ones first, in their order."""
    return sorted(values.items(), key=lambda item: [*metrics, item[0]].index(item[0]))


def _curve_chart(
    title: str,
    unit: str,
    keys: list[LegendKey],
    curves: Sequence[Curve],
    form: ChartForm,
    notes: Sequence[str] = (),
) -> Chart:
    drawing = draw_curves(title, curves, form)
    drawings = {"curve": Markup(drawing)} if drawing else {}
    return Chart(title, unit, keys, drawings, list(notes))


def _drawn(charts: Iterable[Chart]) -> list[Chart]:
    """The charts that have anything to show."""
    return [chart for chart in charts if chart.drawings]


def _with_gaps(
    points: Sequence[tuple[float, float]], parts: Sequence[str]
) -> Iterator[tuple[float, float]]:
    for place, point in enumerate(points):
        if place and not (parts[place].isdigit() and parts[place - 1].isdigit()):
            yield point[0] - 0.5, math.nan
        yield point
