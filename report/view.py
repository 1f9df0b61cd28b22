"""Read what a finished or running run has left on disk, for the terminal and the page."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cpt_merge.cluster.attempts import Attempt, attempts
from cpt_merge.core.artifact import StageRecord, read_record
from cpt_merge.core.errors import UserError
from cpt_merge.launcher.stage import Stage
from cpt_merge.launcher.stages import STAGE_NAMES, pipeline
from cpt_merge.tracking import STEP, Cell, StageLog, read_log

SWEEP = "sweep"  # the folder of the ratio sweep

# metrics of a preview that are listed first
PREVIEWED_FIRST = ("chat", "instruction_checks", "in_language", "stopped")


@dataclass(frozen=True)
class StageView:
    """What one stage has left on disk."""

    name: str
    record: StageRecord | None  # of a finished stage
    log: StageLog

    @property
    def exists(self) -> bool:
        """Whether the stage left anything."""
        return bool(self.record or self.log.run)

    @property
    def state(self) -> str:
        """How the stage ended; the disk does not tell running from cut short."""
        if self.record:
            return "finished"
        return self.end[0] if self.end else "running or cut short"

    @property
    def key(self) -> str | None:
        """The key by which later stages identify this stage's result; None if unknown."""
        key = self.record.key if self.record else self.log.run.get("settings", {}).get("key")
        return None if key is None else str(key)

    @property
    def end(self) -> tuple[str, str] | None:
        """(failed or stopped, the message) if the stage ended so and was not started again."""
        ends = {f"{self.name} {word}": word for word in ("failed", "stopped")}
        for alert in reversed(self.log.alerts):
            if alert["title"] in ends and alert["time"] >= max(self.started, self.last_sign):
                return ends[alert["title"]], alert["text"]
        return None

    @property
    def seconds(self) -> float:
        """How long the stage took, or the time from its start to the last row that it logged."""
        if self.record:
            return self.record.seconds
        return max(self.last_sign - self.started, 0.0)

    @property
    def started(self) -> float:
        """When its last attempt started."""
        return float(self.log.run.get("started", 0.0))

    @property
    def continued(self) -> bool:
        """Whether its last attempt continued an earlier one: rows are older than its start."""
        return bool(self.log.rows) and float(self.log.rows[0]["time"]) < self.started

    @property
    def last_sign(self) -> float:
        """When it last logged a row."""
        return float(self.log.rows[-1]["time"]) if self.log.rows else self.started

    @property
    def results(self) -> dict[str, Any]:
        """The results of a finished stage, the last step of an unfinished one."""
        if self.record:
            return self.record.results
        steps = [row[STEP] for row in self.log.rows if STEP in row]
        return {"step": steps[-1]} if steps else {}


@dataclass(frozen=True)
class AlertGroup:
    """The alerts of one stage with the same title."""

    stage: str
    title: str
    alerts: list[tuple[float, str]]  # (time, text), newest first


@dataclass(frozen=True)
class RunView:
    """The stages of a run that have left something, in their order."""

    directory: Path
    stages: list[StageView]
    attempts: list[Attempt] = field(default_factory=list)  # of the Slurm job
    sweep: StageView | None = None  # not a stage: it may follow at any time, or never

    @property
    def name(self) -> str:
        """The run's name: that of its folder."""
        return self.directory.resolve().name

    @property
    def logged(self) -> list[StageView]:
        """Everything that has a log: the stages, and the sweep if there is one."""
        return [*self.stages, *([self.sweep] if self.sweep else [])]

    @property
    def given_up(self) -> bool:
        """Whether the Slurm job was given up."""
        return bool(self.attempts) and self.attempts[-1].ended.get("verdict") == "given up"

    def log(self, stage: str) -> StageLog:
        """A stage's log, empty if there is none."""
        return next((view.log for view in self.logged if view.name == stage), StageLog())

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe, as the newest stage logged it."""
        for stage in reversed(self.stages):
            settings: dict[str, Any] = stage.log.run.get("settings", {})
            if settings:
                return dict(settings.get("recipe", settings))
        return {}

    @cached_property
    def pipeline(self) -> dict[str, Stage]:
        """The stages of the recipe, those that have not started included, by name."""
        finetune = self.recipe.get("finetune") or {}
        stages = pipeline(finetune.get("after"), bool(self.recipe.get("dpo")))
        return {stage.name: stage for stage in stages}

    @cached_property
    def older(self) -> dict[str, list[str]]:
        """For each finished stage with outdated inputs, those inputs."""
        known = [view for view in self.stages if view.name in self.pipeline]
        finished = [(view, view.record) for view in known if view.record]
        newest: dict[str, str] = {}
        for _, record in sorted(finished, key=lambda one: one[1].finished):
            newest.update(record.inputs)
        keys, found = {view.name: view.key for view in self.stages}, dict[str, list[str]]()
        for view, record in finished:
            names: list[str] = []
            for name, digest in record.inputs.items():
                made = self.pipeline[view.name].inputs.get(name)
                maker = made.name if made else None
                if maker is None:
                    names += [name.split()[0]] * (newest[name] != digest)  # "text" for every file
                elif keys.get(maker) is not None and digest != f"stage:{keys[maker]}":
                    names.append(maker)
                else:
                    names += found.get(maker, [])
            if names:
                found[view.name] = list(dict.fromkeys(names))
        return found

    def note(self, stage: str) -> str:
        """The warning next to the numbers of a stage with outdated inputs; else empty."""
        return f"from older inputs: {', '.join(self.older[stage])}" if stage in self.older else ""

    @property
    def alerts(self) -> list[AlertGroup]:
        """All alerts except notices, grouped; the group with the newest alert comes first."""
        groups: dict[tuple[str, str], list[tuple[float, str]]] = {}
        for stage in self.logged:
            for alert in stage.log.alerts:
                if alert["title"] != f"{stage.name} finished":
                    one = (float(alert["time"]), str(alert["text"]))
                    groups.setdefault((stage.name, alert["title"]), []).append(one)
        together = [
            AlertGroup(*names, sorted(group, reverse=True)) for names, group in groups.items()
        ]
        return sorted(together, key=lambda group: group.alerts[0][0], reverse=True)

    @property
    def notices(self) -> list[tuple[float, str, str]]:
        """(time, title, text) of the alerts that only report the end of a stage."""
        return [
            (float(alert["time"]), alert["title"], alert["text"])
            for stage in self.logged
            for alert in stage.log.alerts
            if alert["title"] == f"{stage.name} finished"
        ]


def read_run(run: Path) -> RunView:
    """Everything that a run's stages have left. Raises `UserError` if there is nothing."""
    names = [*STAGE_NAMES, SWEEP]
    *views, sweep = [
        StageView(name, read_record(run / name), read_log(run / name / "log")) for name in names
    ]
    stages = [view for view in views if view.exists]
    if not stages:
        known = sorted(
            path.name for path in run.parent.glob("*") if any(path.glob("*/log/run.json"))
        )
        there = f"; runs in {run.parent}: {', '.join(known)}" if known else ""
        raise UserError(
            f"{run} contains no stage of a run; give a run's folder, such as runs/demo{there}."
        )
    return RunView(run, stages, attempts(run), sweep if sweep.exists else None)


@dataclass(frozen=True)
class MetricText:
    """How a metric of the evaluation is displayed."""

    title: str
    meaning: str
    is_share: bool

    def text(self, value: Cell) -> str:
        """A value in a table: 92 % or 2.104."""
        if not isinstance(value, int | float):
            return "–"
        return f"{value:.0%}" if self.is_share else f"{value:.3f}"


METRICS = {
    name: MetricText(title, meaning, name != "bits_per_byte")
    for name, title, meaning in (
        ("chat", "Good replies", "stop, are in the prompt's language and keep the chat format"),
        ("bits_per_byte", "Bits per byte", "of held-out text; lower is better"),
        ("stopped", "Replies that stop by themselves", "before the token limit"),
        ("in_language", "Replies in the prompt's language", "by script"),
        ("keeps_format", "Replies that keep the chat format", "no marker of the template in them"),
        ("repetition", "Repetition", "share of a reply that repeats itself; lower is better"),
    )
}


def metrics_of(log: StageLog) -> dict[str, MetricText]:
    """How each metric of an evaluation is displayed: those above, then the evaluation's others."""
    others = {
        str(row["metric"]): MetricText(
            f"{row['evaluator']}: {row['heading']}".capitalize(),
            f"{row['meaning']}" + ("" if row["more is better"] else "; lower is better"),
            bool(row["share"]),
        )
        for row in log.records("eval/metrics")
    }
    return {**METRICS, **{name: text for name, text in others.items() if name not in METRICS}}


TITLES = {  # of logged tables
    "eval/scores": "All scores, with their intervals",
    "eval/breakdowns": "Scores by turn, kind of check and category",
    "eval/differences": "All differences, with intervals and p-values",
    "eval/metrics": "What each metric means",
    "eval/not_run": "What was not measured, and why",
    "merge/norms": "Norms by layer",
    "tokenizer/fertility": "Tokens per character before and after",
    "tokenizer/examples": "Texts split by both tokenizers",
    "tokenizer/gain curve": "What each further piece brings",
    "tokenizer/usefulness": "How the new pieces are used",
    "data/document lengths": "Document lengths",
}


def title_of(table: str) -> str:
    """What a logged table is called on the page."""
    return TITLES.get(table) or table.rpartition("/")[2].replace("_", " ").capitalize()


@dataclass(frozen=True)
class Change:
    """A difference to the baseline that is no chance, in words."""

    model: str
    language: str
    what: str
    change: str
    interval: str


def changes_of(log: StageLog) -> list[Change]:
    """The differences of an evaluation that remain after the correction for their number."""
    texts, found = metrics_of(log), []
    for row in log.records("eval/differences"):
        value = next((row[name] for name in row if name.startswith("minus ")), None)
        if not row["beyond"] or not isinstance(value, int | float):
            continue
        text = metric_text(texts, str(row["metric"]))
        low, high = (_signed(float(row[end] or 0), text.is_share) for end in ("low", "high"))
        found.append(
            Change(
                str(row["model"]),
                str(row["language"]),
                text.title,
                _signed(value, text.is_share),
                f"{low} to {high}",
            )
        )
    return found


def baseline_of(log: StageLog) -> str:
    """The model that the others are compared with; empty if none is."""
    rows = log.records("eval/differences")
    names = (name for name in (rows[0] if rows else {}) if name.startswith("minus "))
    return next(names, "").removeprefix("minus ")


def _signed(value: float, is_share: bool) -> str:
    return f"{100 * value:+.0f} points" if is_share else f"{value:+.3f}"


def metric_text(metrics: dict[str, MetricText], name: str, is_share: bool = False) -> MetricText:
    """The text of a metric; of an unknown one, its name."""
    return metrics.get(name) or MetricText(name.replace("_", " ").capitalize(), "", is_share)


def scores_of(log: StageLog) -> dict[tuple[str, str, str], float]:
    """An evaluation's values by metric, model and language."""
    return {
        (str(row["metric"]), str(row["model"]), str(row["language"])): row["value"]
        for row in log.records("eval/scores")
        if isinstance(row["value"], int | float)
    }


@dataclass(frozen=True)
class Pivot:
    """The values of one metric by model and language, as text."""

    languages: list[str]
    rows: list[list[str]]  # model, then a value for each language


def score_pivots(log: StageLog) -> dict[str, Pivot]:
    """For each metric of an evaluation, its values by model and language."""
    scores = log.records("eval/scores")
    values = {(row["metric"], row["model"], row["language"]): row["value"] for row in scores}
    metrics, models, languages = (
        list(dict.fromkeys(str(key[place]) for key in values)) for place in range(3)
    )
    texts, pivots = metrics_of(log), dict[str, Pivot]()
    for metric in metrics:
        present = [one for one in languages if any((metric, m, one) in values for m in models)]
        text = metric_text(texts, metric).text
        rows = [[m, *(text(values.get((metric, m, one))) for one in present)] for m in models]
        pivots[metric] = Pivot(present, rows)
    return pivots


def previewed_metrics(log: StageLog) -> dict[str, dict[str, str]]:
    """Of the previews during training: metric -> language -> name in the log."""
    found: dict[str, dict[str, str]] = {}
    for name in log.metrics:
        if name.startswith("preview/") and name.count("/") == 2:
            _, language, metric = name.split("/")
            found.setdefault(metric, {})[language] = name
    return dict(sorted(found.items(), key=lambda item: [*PREVIEWED_FIRST, item[0]].index(item[0])))


@dataclass(frozen=True)
class SweepTable:
    """A sweep as a table with a row for each ratio."""

    columns: list[str]
    rows: list[list[str]]
    chosen: int | None  # the recommended row
    sentence: str  # the recommendation; empty of an unfinished sweep


def sweep_table(view: RunView) -> SweepTable | None:
    """The sweep's metrics by ratio; None if no ratio was measured."""
    log, texts = view.log(SWEEP), metrics_of(view.log("evaluation"))
    table = log.tables.get("sweep/ratios")
    if table is None:
        return None
    columns = table.columns[:-1]  # the last one marks the recommended row
    rows = [
        [
            str(cell or "") if isinstance(cell, str | None) else metric_text(texts, name).text(cell)
            for name, cell in zip(columns, row, strict=False)
        ]
        for row in table.rows
    ]
    chosen = next((place for place, row in enumerate(table.rows) if row[-1]), None)
    headings = [name.replace("_", " ") for name in columns]
    return SweepTable(headings, rows, chosen, str(log.summary.get("sweep/recommendation", "")))


def number(value: object) -> str:
    """A result for people: thousands grouped, four significant digits, a dash for nothing."""
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
