"""What a reader wants to know first: whether the run went well, and how far it is."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from cpt_merge.core.errors import UserError
from cpt_merge.core.languages import find_language
from cpt_merge.core.progress import counted
from cpt_merge.launcher.loops import loops_of
from cpt_merge.report.view import (
    SWEEP,
    RunView,
    StageView,
    duration,
    number,
    previewed_metrics,
    scores_of,
)
from cpt_merge.tracking import STEP, StageLog
from cpt_merge.training import TrainingConfig

RESULTS = (
    "aligned",
    "tuned_merged",
    "tuned",
    "merged",
)  # what a run is for: the first of these that it has


@dataclass(frozen=True)
class MiniBar:
    """One model's value as a bar next to its name."""

    name: str
    share: float  # of the longest bar, 0 .. 1
    cells: list[str]  # next to the bar, a value for each of the tile's columns


@dataclass(frozen=True)
class Tile:
    """One large number, with what it has to be compared to."""

    title: str
    value: str
    about: str = ""
    notes: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    bars: list[MiniBar] = field(default_factory=list)


@dataclass(frozen=True)
class StageMark:
    """One stage in the strip at the top."""

    name: str
    state: str  # finished, open, failed, none
    text: str


@dataclass(frozen=True)
class RunState:
    """The state of the run (finished, open or failed), in a few words and in a sentence."""

    state: str
    words: str
    sentence: str = ""


@dataclass(frozen=True)
class TrainingProgress:
    """How far training is."""

    step: int
    steps: int
    left: str  # time left, in words; empty if unknown


def run_state(view: RunView, now: float) -> RunState:
    """The state of the run at the time `now`."""
    if view.given_up:
        return RunState("failed", "given up", view.attempts[-1].ended["reason"])
    unfinished = [stage for stage in view.stages if not stage.record]
    if unfinished:
        stage = unfinished[-1]
        if stage.state == "failed":  # its message is among the alerts
            return RunState("failed", f"{stage.name} failed")
        ago = duration(max(now - stage.last_sign, 0))
        last = f"its last sign came {ago} before this page was written"
        return RunState("open", f"{stage.name} is {stage.state}; {last}")
    if view.pipeline.keys() - {stage.name for stage in view.stages}:
        last = view.stages[-1].name
        return RunState("open", f"finished up to {last}; the later stages have not started")
    if view.older:
        older = ", ".join(view.older)
        return RunState("open", f"finished, but made from older inputs: {older}; run them again")
    return RunState("finished", f"all {len(view.pipeline)} stages are finished")


def verdict(view: RunView) -> list[str]:
    """What came of the run: a sentence for each language; none before it is evaluated."""
    log = view.log("evaluation")
    scores = scores_of(log)
    result = next((name for name in RESULTS if any(m == name for _, m, _ in scores)), None)
    if result is None:
        return []
    beyond = {
        (row["language"], row["metric"])
        for row in log.records("eval/differences")
        if row["model"] == result and row["beyond"]
    }
    languages = [one for metric, model, one in scores if metric == "chat" and model == result]
    return [_of_language(scores, result, one, (one, "chat") in beyond) for one in languages]


def _of_language(
    scores: Mapping[tuple[str, str, str], float], result: str, language: str, beyond: bool
) -> str:
    """How good replies in a language are, next to what they were, and what that cost."""
    good = scores["chat", result, language]
    others = [
        f"{scores['chat', model, language]:.0%} {words}"
        for model, words in (("cpt", "before the vector"), ("chat", "for the chat model"))
        if ("chat", model, language) in scores
    ]
    text = f"{language_name(language)}: {good:.0%} of the replies are good"
    text += f" ({', '.join(others)})" if others else ""
    text += "" if beyond else ", which may be chance"
    bits = [scores.get(("bits_per_byte", model, language)) for model in (result, "cpt")]
    if bits[0] is not None and bits[1]:
        how = "worse" if bits[0] > bits[1] else "better"
        text += f"; text is predicted {abs(bits[0] / bits[1] - 1):.0%} {how} than before the vector"
    return f"{text}."


def language_name(tag: str) -> str:
    """The name of a language, or its tag."""
    try:
        return find_language(tag).name
    except UserError:
        return tag


def stage_marks(view: RunView) -> list[StageMark]:
    """Every stage, including those that have not started."""
    known = {stage.name: stage for stage in view.stages}
    return [_mark(view, name, known.get(name)) for name in view.pipeline]


def _mark(view: RunView, name: str, stage: StageView | None) -> StageMark:
    if stage is None:
        return StageMark(name, "none", "not started")
    if stage.record is None:
        if view.given_up or stage.state == "failed":
            return StageMark(name, "failed", "not finished")
        return StageMark(name, "open", stage.state)
    took = duration(stage.seconds) + (" (last attempt)" if stage.continued else "")
    note = view.note(name)
    return StageMark(name, "open", f"{took}, {note}") if note else StageMark(name, "finished", took)


def training_progress(view: RunView) -> TrainingProgress | None:
    """The progress of a training or fine-tuning that is not finished and has logged a step."""
    loops = _loops(view)
    stage = next((one for one in view.stages if one.name in loops and not one.record), None)
    if stage is None:
        return None
    rows = [row for row in stage.log.rows if "train/tokens_per_second" in row and STEP in row]
    if not rows:
        return None
    config, step = loops[stage.name], int(rows[-1][STEP])
    rate = statistics.median(row["train/tokens_per_second"] for row in rows[-10:])
    tokens = (config.steps - step) * config.tokens_per_step
    runs = rate > 0 and not stage.end and not view.given_up
    return TrainingProgress(step, config.steps, duration(tokens / rate) if runs else "")


def _loops(view: RunView) -> dict[str, TrainingConfig]:
    """See `loops_of`; empty if the logged recipe is not whole."""
    try:
        return loops_of(view.directory, view.recipe)
    except UserError:
        return {}


def tiles(view: RunView) -> list[Tile]:
    """The tiles for which there are numbers."""
    scores, training = scores_of(view.log("evaluation")), view.log("training")
    loops = _loops(view)
    by_stage: dict[str, list[Tile]] = {
        "evaluation": list(_evaluated(scores)),
        "training": [
            *(() if scores else (*_previewed(training), *_validated(training))),
            *_trained(training, loops.get("training")),
        ],
        "finetune": list(_trained(view.log("finetune"), loops.get("finetune"), "Fine-tuning")),
        "dpo": list(_trained(view.log("dpo"), loops.get("dpo"), "Preference")),
        "tokenizer": list(_tokenized(view.log("tokenizer"))),
        "merge": list(_merged(view.log("merge"))),
        SWEEP: list(_swept(view)),
    }
    return [
        replace(tile, notes=[*tile.notes, *filter(None, [view.note(stage)])])
        for stage, tiles_of_stage in by_stage.items()
        for tile in tiles_of_stage
    ]


def _evaluated(scores: Mapping[tuple[str, str, str], float]) -> Iterator[Tile]:
    """For each language, good replies (if there are replies) and bits per byte of every model."""
    models = list(dict.fromkeys(model for _, model, _ in scores))
    for language in dict.fromkeys(language for _, _, language in scores):
        chat, bits = (
            {m: scores[metric, m, language] for m in models if (metric, m, language) in scores}
            for metric in ("chat", "bits_per_byte")
        )
        shown = chat or bits
        if not shown:
            continue
        last = next((name for name in RESULTS if name in shown), list(shown)[-1])
        longest = 1.0 if chat else max(bits.values()) or 1.0
        texts = [{model: _share(value) for model, value in chat.items()}] * bool(chat)
        texts += [{model: f"{value:.2f}" for model, value in bits.items()}] * bool(bits)
        bars = [
            MiniBar(model, value / longest, [column.get(model, "–") for column in texts])
            for model, value in shown.items()
        ]
        columns = ["good"] * bool(chat) + ["bits per byte"] * bool(bits)
        title, about = (
            ("Good replies", f"of the {last} model's")
            if chat
            else ("Bits per byte", f"of the {last} model; lower is better")
        )
        yield Tile(f"{title}, {language}", texts[0][last], about, [], columns, bars)


def _previewed(log: StageLog) -> Iterator[Tile]:
    """Of a run without evaluation: the newest preview of the chat model."""
    points = {
        language: log.series(name)
        for language, name in previewed_metrics(log).get("chat", {}).items()
    }
    newest = {language: found[-1] for language, found in points.items() if found}
    if newest:
        step = max(step for step, _ in newest.values())
        note = ", ".join(f"{language} {_share(value)}" for language, (_, value) in newest.items())
        value = _share(statistics.fmean(value for _, value in newest.values()))
        yield Tile("Preview of the chat model", value, f"good replies at step {step:,.0f}", [note])


def _validated(log: StageLog) -> Iterator[Tile]:
    """Of a run without evaluation: the newest validation bits per byte, with the base's."""
    for name in log.metrics:
        if not name.endswith("/bits_per_byte"):
            continue
        language, points = name.split("/")[1], log.series(name)
        if language.endswith("_base") or not points:
            continue
        base = log.series(f"valid/{language}_base/bits_per_byte")
        notes = [f"base, with its own tokenizer: {base[-1][1]:.2f}"] if base else []
        notes.append(f"{points[0][1]:.2f} at step {points[0][0]:,.0f}")
        about = f"at step {points[-1][0]:,.0f}"
        yield Tile(f"Validation bits per byte, {language}", f"{points[-1][1]:.2f}", about, notes)


def _trained(
    log: StageLog, config: TrainingConfig | None, what: str = "Training"
) -> Iterator[Tile]:
    points = log.series("train/loss")
    if not points:
        return
    rates = [row["train/tokens_per_second"] for row in log.rows if "train/tokens_per_second" in row]
    tokens = log.newest.get("train/tokens")
    step = f"step {points[-1][0]:,.0f}" + (f" of {config.steps:,}" if config else "")
    notes = [step + (f", {counted(int(tokens), 'token')}" if tokens is not None else "")]
    notes += [f"median of {statistics.median(rates):,.0f} tokens per second"] if rates else []
    about = f"nats per token, from {number(points[0][1])}"
    yield Tile(f"{what} loss", number(points[-1][1]), about, notes)


def _tokenized(log: StageLog) -> Iterator[Tile]:
    rows = log.records("tokenizer/fertility")
    changed = [row for row in rows if row.get("tok/char base") != row.get("tok/char new")]
    if changed:
        best = changed[0]
        notes = [
            f"{row['language']} {_two(row['tok/char base'])} → {_two(row['tok/char new'])}"
            for row in rows
        ]
        about = f"{best['language']}, before {_two(best['tok/char base'])}"
        value = _two(best["tok/char new"])
        yield Tile("Tokens per character", value, about, [", ".join(notes)])


def _merged(log: StageLog) -> Iterator[Tile]:
    overall, rows = log.summary.get("merge/overall", {}), log.summary.get("merge/row_counts", {})
    if "vector" not in overall:
        return
    notes = []
    if "change" in overall:
        change, cosine = _share(overall["change"], 1), overall["cosine"]
        notes.append(f"CPT change {change}, cosine between them {cosine:.2f}")
    counts = ", ".join(f"{count:,} {role}" for role, count in rows.items() if count)
    notes += [f"rows: {counts}"] if counts else []
    ratio = log.summary.get("merge/ratio")
    added = "" if ratio is None else f", added at ratio {number(ratio)}"
    yield Tile("Chat vector", _share(overall["vector"], 1), f"of the base's norm{added}", notes)


def _swept(view: RunView) -> Iterator[Tile]:
    summary, merged = view.log(SWEEP).summary, view.log("merge").summary.get("merge/ratio")
    if "sweep/recommendation" in summary:
        ratio = summary.get("sweep/recommended_ratio")
        about = "see below" if ratio is None else "recommended for the chat vector"
        notes = [] if merged is None else [f"the merge's ratio is {number(merged)}"]
        yield Tile("Ratio sweep", number(ratio), about, notes)


def _share(value: float, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f} %"


def _two(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else number(value)
