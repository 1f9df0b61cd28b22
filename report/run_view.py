"""What is on disk of a finished or running run, on the terminal and as one HTML page."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from cpt_merge.cluster.attempts import Attempt, attempts
from cpt_merge.core.artifact import StageRecord, read_record, write_text
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import console, say
from cpt_merge.launcher.stages import STAGES, find_stage
from cpt_merge.tracking import STEP, Cell, StageLog, read_log

PAGE = "report.html"
Pivot = tuple[list[str], list[list[str]]]  # columns after the first, rows as they are shown
SWEEP = "sweep"  # the folder that it is in
SHOWN_CHARACTERS = 120  # of a preview's prompt and of its reply, on the terminal
KEY_RESULTS = 5  # results of a stage in the overview; the page has them all


@dataclass(frozen=True)
class StageView:
    """One stage as it lies on disk."""

    name: str
    record: StageRecord | None  # of a finished stage
    log: StageLog

    @property
    def is_there(self) -> bool:
        """Whether it left anything."""
        return bool(self.record or self.log.run)

    @property
    def state(self) -> str:
        """A stage without its record that did not say how it ended may be running, or may have been killed."""
        if self.record:
            return "finished"
        return self.end[0] if self.end else "running or cut short"

    @property
    def key(self) -> str | None:
        """By which stages after this one know what it leaves, or will leave; None where its log is too old to say."""
        key = self.record.key if self.record else self.log.run.get("settings", {}).get("key")
        return None if key is None else str(key)

    @property
    def end(self) -> tuple[str, str] | None:
        """(failed or stopped, what it said) of a stage that ended so and was not started again."""
        ends = {f"{self.name} {word}": word for word in ("failed", "stopped")}
        for alert in reversed(self.log.alerts):
            if alert["title"] in ends and alert["time"] >= max(self.started, self.last_sign):
                return ends[alert["title"]], alert["text"]
        return None

    @property
    def seconds(self) -> float:
        """What the stage took, or the time from its start to the last row that it logged."""
        if self.record:
            return self.record.seconds
        return max(self.last_sign - self.started, 0.0)

    @property
    def started(self) -> float:
        """When its last attempt started."""
        return float(self.log.run.get("started", 0.0))

    @property
    def first_row(self) -> float:
        """When the first of the rows that stand was logged: before `started` in a stage that was continued."""
        return float(self.log.rows[0]["time"]) if self.log.rows else self.started

    @property
    def last_sign(self) -> float:
        """When it last logged anything."""
        return float(self.log.rows[-1]["time"]) if self.log.rows else self.started

    @property
    def results(self) -> dict[str, Any]:
        """The stage's own results; how far it is, of an unfinished one."""
        if self.record:
            return self.record.results
        steps = [row[STEP] for row in self.log.rows if STEP in row]
        return {"step": steps[-1]} if steps else {}


@dataclass(frozen=True)
class RunView:
    """A run's stages in their order, those that left something."""

    directory: Path
    stages: list[StageView]
    attempts: list[Attempt] = field(default_factory=list)  # starts of the Slurm job
    sweep: StageView | None = None  # which is no stage: it may follow at any time, or never

    @property
    def name(self) -> str:
        """The run's name: that of its folder."""
        return self.directory.resolve().name

    @property
    def logged(self) -> list[StageView]:
        """All that left a log: the stages, and the sweep if there is one."""
        return [*self.stages, *([self.sweep] if self.sweep else [])]

    def log(self, stage: str) -> StageLog:
        """A stage's log; empty where there is none."""
        return next((view.log for view in self.logged if view.name == stage), StageLog())

    @cached_property
    def older(self) -> dict[str, list[str]]:
        """By finished stage, what its result was made from that was made anew, or changed, since."""
        finished = [(view, view.record) for view in self.stages if view.record]
        newest: dict[str, str] = {}
        for _, record in sorted(finished, key=lambda one: one[1].finished):
            newest.update(record.inputs)
        keys, found = {view.name: view.key for view in self.stages}, dict[str, list[str]]()
        for view, record in finished:
            names: list[str] = []
            for name, digest in record.inputs.items():
                made = find_stage(view.name).inputs.get(name)
                maker = made.name if made else None
                if maker is None:
                    names += [name.split()[0]] * (newest[name] != digest)  # of all text just "text"
                elif keys.get(maker) is not None and digest != f"stage:{keys[maker]}":
                    names.append(maker)
                else:
                    names += found.get(maker, [])
            if names:
                found[view.name] = list(dict.fromkeys(names))
        return found

    def note(self, stage: str) -> str:
        """What must be said beside the numbers of a stage that was made from older inputs; else nothing."""
        return f"from older inputs: {', '.join(self.older[stage])}" if stage in self.older else ""


def report(run: Path) -> None:
    """Print an overview of a run and write `report.html` into its folder. Raises `UserError` for an unknown run."""
    view = read_run(run)
    show_stages(view)
    show_training(view.log("training"))
    show_preview(view.log("training"))
    show_alerts(view)
    show_scores(view.log("evaluation"), view.note("evaluation"))
    show_sweep(view)
    from cpt_merge.report.page import render_page

    page = run / PAGE
    write_text(page, render_page(view, time.time()))
    say(f"report: {page}")


def read_run(run: Path) -> RunView:
    """Everything that a run's stages left. Raises `UserError` where there is none of it."""
    names = [*(stage.name for stage in STAGES), SWEEP]
    *views, sweep = [
        StageView(name, read_record(run / name), read_log(run / name / "log")) for name in names
    ]
    stages = [view for view in views if view.is_there]
    if not stages:
        known = sorted(
            path.name for path in run.parent.glob("*") if any(path.glob("*/log/run.json"))
        )
        there = f"; runs there: {', '.join(known)}" if known else ""
        raise UserError(
            f"{run} holds no stage of a run; give a run's folder, such as runs/demo{there}."
        )
    return RunView(run, stages, attempts(run), sweep if sweep.is_there else None)


@dataclass(frozen=True)
class Matter:
    """The alerts of one stage that have one title."""

    stage: str
    title: str
    said: list[tuple[float, str]]  # (time, text), oldest first


def is_notice(stage: StageView, alert: dict[str, Any]) -> bool:
    """Whether an alert only says that the stage is done."""
    return bool(alert["title"] == f"{stage.name} finished")


def matters(view: RunView) -> list[Matter]:
    """All alerts but the notices, by what they are about; that of the newest first."""
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for stage in view.logged:
        for alert in stage.log.alerts:
            if is_notice(stage, alert):
                continue
            found.setdefault((stage.name, alert["title"]), []).append(
                (float(alert["time"]), str(alert["text"]))
            )
    together = [Matter(*names, sorted(said)) for names, said in found.items()]
    return sorted(together, key=lambda matter: matter.said[-1][0], reverse=True)


def latest(log: StageLog) -> dict[str, float]:
    """The newest value of every metric."""
    values: dict[str, float] = {}
    for row in log.rows:
        values.update(row)
    values.pop("time", None)
    return values


# metric -> title, what it says, whether it is a share
METRICS = {
    "chat": (
        "Good replies",
        "stop by themselves, are in the prompt's language and keep the chat format",
        True,
    ),
    "bits_per_byte": ("Bits per byte", "of held-out text; lower is better", False),
    "stopped": ("Replies that stop by themselves", "before the limit of tokens", True),
    "in_language": ("Replies in the prompt's language", "by script", True),
    "keeps_format": (
        "Replies that keep the chat format",
        "no marker of the template in the text",
        True,
    ),
    "repetition": ("Repetition", "share of a reply that repeats itself; lower is better", True),
}

PREVIEWED = (
    "chat",
    "instruction_checks",
    "in_language",
    "stopped",
)  # metrics of a preview that come first


def metrics_of(log: StageLog) -> dict[str, tuple[str, str, bool]]:
    """Of every metric its title, what it says, and whether it is a share: those above, then the evaluation's others."""
    table = log.tables.get("eval/metrics")
    rows = [dict(zip(table.columns, cells, strict=True)) for cells in table.rows] if table else []
    own = {
        str(row["metric"]): (
            f"{row['evaluator']}: {row['heading']}".capitalize(),
            f"{row['meaning']}" + ("" if row["more is better"] else "; lower is better"),
            bool(row["share"]),
        )
        for row in rows
    }
    return METRICS | {name: about for name, about in own.items() if name not in METRICS}


def score_pivots(log: StageLog) -> dict[str, Pivot]:
    """Of an evaluation's scores, for each metric: languages, and a row per model with its values by language."""
    table = log.tables.get("eval/scores")
    if table is None:
        return {}
    values = {(row[2], row[0], row[1]): row[3] for row in table.rows}  # (metric, model, language)
    shares = _shares(log)
    metrics, models, languages = (
        list(dict.fromkeys(key[place] for key in values)) for place in range(3)
    )
    pivots: dict[str, Pivot] = {}
    for metric in metrics:
        form = "{:.0%}" if metric in shares else "{:.3f}"
        present = [
            language
            for language in languages
            if any((metric, model, language) in values for model in models)
        ]
        rows = [
            [
                str(model),
                *(_shown(form, values.get((metric, model, language))) for language in present),
            ]
            for model in models
        ]
        pivots[str(metric)] = [str(language) for language in present], rows
    return pivots


def columns_of(log: StageLog, name: str, *columns: str) -> list[list[Cell]]:
    """The named columns of a table; nothing if it or one of them is not there."""
    table = log.tables.get(name)
    if table is None or not set(columns) <= set(table.columns):
        return []
    places = [table.columns.index(column) for column in columns]
    return [[row[place] for place in places] for row in table.rows]


def previewed_metrics(log: StageLog) -> dict[str, dict[str, str]]:
    """Of the previews during training: metric -> language -> name of the metric. The metrics come in their order."""
    names = dict.fromkeys(name for row in log.rows for name in row)
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if name.startswith("preview/") and name.count("/") == 2:
            _, language, metric = name.split("/")
            found.setdefault(metric, {})[language] = name
    return dict(sorted(found.items(), key=lambda item: [*PREVIEWED, item[0]].index(item[0])))


def preview_rows(log: StageLog) -> list[dict[str, Cell]]:
    """The replies of all previews, oldest first."""
    table = log.tables.get("preview/replies")
    return [dict(zip(table.columns, cells, strict=True)) for cells in table.rows] if table else []


@dataclass(frozen=True)
class Ratios:
    """A sweep as a table: a row for each ratio."""

    columns: list[str]
    rows: list[list[str]]
    chosen: int | None  # row that is recommended
    sentence: str  # that says how the recommendation came out; empty of an unfinished sweep


def ratios_of(view: RunView) -> Ratios | None:
    """The sweep's metrics by ratio; None where no ratio was measured."""
    log, shares = view.log(SWEEP), _shares(view.log("evaluation"))
    table = log.tables.get("sweep/ratios")
    if table is None:
        return None
    columns = table.columns[:-1]  # the last one says which is recommended
    rows = [
        [
            str(cell or "")
            if isinstance(cell, str | None)
            else _shown("{:.0%}" if name in shares else "{:.3f}", cell)
            for name, cell in zip(columns, row, strict=False)
        ]
        for row in table.rows
    ]
    chosen = next((place for place, row in enumerate(table.rows) if row[-1]), None)
    return Ratios(
        [_heading(name) for name in columns],
        rows,
        chosen,
        str(log.summary.get("sweep/recommendation", "")),
    )


def _shares(log: StageLog) -> set[str]:
    return {name for name, (_, _, share) in metrics_of(log).items() if share}


def _heading(metric: str) -> str:
    return metric.replace("_", " ")


def _shown(form: str, value: Cell) -> str:
    return "–" if value is None else form.format(value)


def number(value: object) -> str:
    """A result as people read it: thousands grouped, four significant digits, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    if value.is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `5 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def show_stages(view: RunView) -> None:
    """The overview: a line per stage."""
    columns = ["stage", "state", "time", "results"]
    rows = []
    for stage in view.logged:
        apart = (
            "eval/scores" in stage.log.tables or stage.name == SWEEP
        )  # shown as tables of their own
        results = {} if apart else stage.results
        scalars = {
            name: value for name, value in results.items() if isinstance(value, (int, float, str))
        }
        shown = [f"{name} {number(value)}" for name, value in list(scalars.items())[:KEY_RESULTS]]
        more = [f"and {len(scalars) - KEY_RESULTS} more"] if len(scalars) > KEY_RESULTS else []
        state = stage.state + ", older" * (stage.name in view.older)
        rows.append([stage.name, state, duration(stage.seconds), ", ".join(shown + more)])
    show_table(f"run {view.name}", columns, rows)
    for name in view.older:
        console.print(Text(f"{name} was made {view.note(name)}; run it again", style="yellow"))


def show_training(log: StageLog) -> None:
    """The newest training metrics; those of a preview have a table of their own."""
    apart = {name for names in previewed_metrics(log).values() for name in names.values()}
    values = {name: value for name, value in latest(log).items() if name not in apart}
    if values:
        show_table(
            "training, newest values",
            ["metric", "value"],
            [[name, number(values[name])] for name in values],
        )


def show_preview(log: StageLog) -> None:
    """The newest preview of the chat model: its metrics, and its replies."""
    metrics, values = previewed_metrics(log), latest(log)
    languages = list(dict.fromkeys(language for names in metrics.values() for language in names))
    replies = preview_rows(log)
    if not metrics or not replies:
        return
    step = replies[-1]["step"]
    cells = [
        [
            language,
            *(_shown("{:.0%}", values.get(names.get(language, ""))) for names in metrics.values()),
        ]
        for language in languages
    ]
    show_table(
        f"preview of the chat model at step {number(step)}",
        ["language", *map(_heading, metrics)],
        cells,
    )
    newest = [row for row in replies if row["step"] == step]
    said = [
        [str(row["language"]), *(_one_line(row[name]) for name in ("prompt", "reply"))]
        for row in newest
    ]
    show_table("what it says", ["language", "prompt", "reply"], said, whole=True)


def _one_line(value: Cell) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"


def show_sweep(view: RunView) -> None:
    """Figures by ratio, and the recommendation."""
    found = ratios_of(view)
    if found is None:
        return
    rows = [
        [f"{row[0]} ←" if place == found.chosen else row[0], *row[1:]]
        for place, row in enumerate(found.rows)
    ]
    show_table("sweep, means over the new languages", found.columns, rows)
    if found.sentence:
        console.print(Text(f"sweep: {found.sentence}"))


def show_alerts(view: RunView) -> None:
    """The newest alert of every matter."""
    for matter in matters(view):
        before = f" (and {len(matter.said) - 1:,} before it)" if len(matter.said) > 1 else ""
        console.print(Text(f"alert: {matter.title}: {matter.said[-1][1]}{before}", style="yellow"))


def show_scores(log: StageLog, note: str) -> None:
    """Bits per byte and the chat share of every model; `note` is what must be said beside them."""
    pivots = score_pivots(log)
    for metric in ("bits_per_byte", "chat"):
        if metric in pivots:
            languages, rows = pivots[metric]
            show_table(
                ", ".join(filter(None, ("evaluation", metric, note))), ["model", *languages], rows
            )


def show_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], whole: bool = False
) -> None:
    """A table on the terminal. Lines are broken in the last column, in all but the first if nothing may be cut."""
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for place, column in enumerate(columns):
        table.add_column(
            Text(column), overflow="fold", no_wrap=place < (1 if whole else len(columns) - 1)
        )
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
