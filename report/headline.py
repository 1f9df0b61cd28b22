"""What a reader wants to know first: did the run go well, and how far is it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cpt_merge.launcher.stages import STAGES
from cpt_merge.report.run_view import SWEEP, RunView, StageView, duration, number, previewed_metrics
from cpt_merge.tracking import STEP, StageLog

Score = Mapping[tuple[str, str, str], float]  # (metric, model, language) -> value


@dataclass(frozen=True)
class MiniBar:
    """One model's value as a bar beside its name."""

    name: str
    share: float  # of the longest bar, 0 .. 1
    cells: list[str]  # beside the bar, a value for each of the tile's columns


@dataclass(frozen=True)
class Tile:
    """One number, large, with what it has to be seen beside."""

    title: str
    value: str
    about: str = ""
    notes: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    bars: list[MiniBar] = field(default_factory=list)


@dataclass(frozen=True)
class Mark:
    """One stage in the strip at the top."""

    name: str
    state: str  # finished, open, failed, none
    text: str


def scores_of(log: StageLog) -> dict[tuple[str, str, str], float]:
    """An evaluation's values by metric, model and language."""
    table = log.tables.get("eval/scores")
    rows = [dict(zip(table.columns, cells, strict=True)) for cells in table.rows] if table else []
    return {
        (str(row["metric"]), str(row["model"]), str(row["language"])): row["value"]
        for row in rows
        if isinstance(row["value"], int | float)
    }


def strip(view: RunView) -> list[Mark]:
    """Every stage, also those that have not begun."""
    there = {stage.name: stage for stage in view.stages}
    return [
        _mark(stage.name, there.get(stage.name), given_up(view), view.note(stage.name))
        for stage in STAGES
    ]


def _mark(name: str, stage: StageView | None, failed: bool, note: str) -> Mark:
    if stage is None:
        return Mark(name, "none", "not begun")
    if stage.record is None:
        failed = failed or stage.state == "failed"
        return Mark(name, "failed", "not finished") if failed else Mark(name, "open", stage.state)
    continued = stage.log.rows and stage.first_row < stage.started
    took = duration(stage.seconds) + (" (last attempt)" if continued else "")
    return Mark(name, "open", f"{took}, {note}") if note else Mark(name, "finished", took)


@dataclass(frozen=True)
class Verdict:
    """How the run stands: finished, open or failed, in a few words and in a sentence."""

    state: str
    words: str
    sentence: str = ""


def verdict(view: RunView, now: float) -> Verdict:
    """How the run stands at the time `now`."""
    if given_up(view):
        return Verdict("failed", "given up", view.attempts[-1].ended["reason"])
    unfinished = [stage for stage in view.stages if not stage.record]
    if unfinished:
        stage, ago = unfinished[-1], duration(max(now - unfinished[-1].last_sign, 0))
        if stage.state == "failed":  # what it said is among the alerts
            return Verdict("failed", f"{stage.name} failed")
        return Verdict(
            "open",
            f"{stage.name} is {stage.state}, its last sign {ago} before this page was written",
        )
    if len(view.stages) < len(STAGES):
        return Verdict(
            "open", f"finished up to {view.stages[-1].name}; the stages after it have not begun"
        )
    if view.older:
        return Verdict(
            "open", f"finished, but made from older inputs: {', '.join(view.older)}; run them again"
        )
    return Verdict("finished", f"all {len(STAGES)} stages are finished")


def given_up(view: RunView) -> bool:
    """Whether the Slurm job was given up."""
    return bool(view.attempts) and view.attempts[-1].ended.get("verdict") == "given up"


@dataclass(frozen=True)
class Progress:
    """How far training is."""

    step: int
    steps: int
    left: str  # time, in words; empty if not known


def progress(view: RunView) -> Progress | None:
    """Of a training that is not finished and has logged a step."""
    stage = next((one for one in view.stages if one.name == "training"), None)
    steps = planned_steps(stage.log) if stage else None
    if stage is None or stage.record or steps is None:
        return None
    rows = [row for row in stage.log.rows if "train/tokens_per_second" in row and STEP in row]
    if not rows:
        return None
    config = _training(stage.log)
    rate = statistics.median(row["train/tokens_per_second"] for row in rows[-10:])
    step = int(rows[-1][STEP])
    tokens = (steps - step) * config["sequence_length"] * config["global_batch_size"]
    return Progress(
        step,
        steps,
        duration(tokens / rate) if rate > 0 and not (stage.end or given_up(view)) else "",
    )


def planned_steps(log: StageLog) -> int | None:
    """The steps of the whole training, by its recipe."""
    config = _training(log)
    try:
        return -(
            -int(config["tokens"])
            // (int(config["sequence_length"]) * int(config["global_batch_size"]))
        )
    except (KeyError, TypeError, ZeroDivisionError):
        return None


def _training(log: StageLog) -> dict[str, Any]:
    found: dict[str, Any] = log.run.get("settings", {}).get("recipe", {}).get("training", {})
    return found


def tiles(view: RunView) -> list[Tile]:
    """The tiles, those that there are numbers for."""
    scores = scores_of(view.log("evaluation"))
    training = view.log("training")
    found = [
        *(("evaluation", tile) for tile in (_evaluated(scores) if scores else ())),
        *(
            ("training", tile)
            for tile in (() if scores else (*_previewed(training), *_validated(training)))
        ),
        *(("training", tile) for tile in _trained(training)),
        *(("tokenizer", tile) for tile in _tokenized(view.log("tokenizer"))),
        *(("merge", tile) for tile in _merged(view.log("merge"))),
        *((SWEEP, tile) for tile in _swept(view)),
    ]
    notes = {stage: [view.note(stage)] for stage in view.older}
    return [replace(tile, notes=[*tile.notes, *notes.get(stage, [])]) for stage, tile in found]


def _evaluated(scores: Score) -> Iterator[Tile]:
    """Per language: good replies, if there are any replies, and bits per byte of every model."""
    models = list(dict.fromkeys(model for _, model, _ in scores))
    for language in dict.fromkeys(language for _, _, language in scores):
        chat = {
            model: scores[key] for model in models if (key := ("chat", model, language)) in scores
        }
        bits = {
            model: scores[key]
            for model in models
            if (key := ("bits_per_byte", model, language)) in scores
        }
        shown = chat or bits
        if not shown:
            continue
        last = "merged" if "merged" in shown else list(shown)[-1]
        longest = 1.0 if chat else max(bits.values()) or 1.0
        columns = ["good"] * bool(chat) + ["bits per byte"] * bool(bits)
        bars = [
            MiniBar(model, value / longest, _cells(model, chat, bits))
            for model, value in shown.items()
        ]
        if chat:
            yield Tile(
                f"Good replies, {language}",
                _share(chat[last]),
                f"of the {last} model's",
                [],
                columns,
                bars,
            )
        else:
            about = f"of the {last} model; lower is better"
            yield Tile(f"Bits per byte, {language}", f"{bits[last]:.2f}", about, [], columns, bars)


def _cells(model: str, chat: Mapping[str, float], bits: Mapping[str, float]) -> list[str]:
    shares = [_share(chat[model]) if model in chat else "–"] if chat else []
    return shares + ([f"{bits[model]:.2f}" if model in bits else "–"] if bits else [])


def _previewed(log: StageLog) -> Iterator[Tile]:
    """Of a run that is not evaluated: the newest preview of the chat model."""
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
    """Of a run that is not evaluated: the newest held-out bits per byte, beside the base's."""
    names = dict.fromkeys(
        name for row in log.rows for name in row if name.endswith("/bits_per_byte")
    )
    for name in names:
        language = name.split("/")[1]
        points = log.series(name)
        if language.endswith("_base") or not points:
            continue
        base = log.series(f"valid/{language}_base/bits_per_byte")
        notes = [f"base, with its own tokenizer: {base[-1][1]:.2f}"] if base else []
        notes.append(f"{points[0][1]:.2f} at step {points[0][0]:,.0f}")
        about = f"at step {points[-1][0]:,.0f}"
        yield Tile(f"Held-out bits per byte, {language}", f"{points[-1][1]:.2f}", about, notes)


def _trained(log: StageLog) -> Iterator[Tile]:
    points = log.series("train/loss")
    if not points:
        return
    rates = [row["train/tokens_per_second"] for row in log.rows if "train/tokens_per_second" in row]
    tokens = [row["train/tokens"] for row in log.rows if "train/tokens" in row]
    steps = planned_steps(log)
    of = f" of {steps:,}" if steps else ""
    notes = [f"step {points[-1][0]:,.0f}{of}" + (f", {tokens[-1]:,.0f} tokens" if tokens else "")]
    notes += [f"{statistics.median(rates):,.0f} tokens per second in the median"] if rates else []
    yield Tile(
        "Training loss",
        number(points[-1][1]),
        f"nats per token, from {number(points[0][1])}",
        notes,
    )


def _tokenized(log: StageLog) -> Iterator[Tile]:
    table = log.tables.get("tokenizer/fertility")
    if table is None or "tok/char new" not in table.columns:
        return
    rows = [dict(zip(table.columns, cells, strict=True)) for cells in table.rows]
    changed = [row for row in rows if row["tok/char base"] != row["tok/char new"]]
    if not changed:
        return
    best = changed[0]
    notes = [
        f"{row['language']} {_two(row['tok/char base'])} → {_two(row['tok/char new'])}"
        for row in rows
    ]
    about = f"{best['language']}, before {_two(best['tok/char base'])}"
    yield Tile("Tokens per character", _two(best["tok/char new"]), about, [", ".join(notes)])


def _share(value: float, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f} %"


def _two(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else number(value)


def _merged(log: StageLog) -> Iterator[Tile]:
    overall, rows = log.summary.get("merge/overall", {}), log.summary.get("merge/row_counts", {})
    if "vector" not in overall:
        return
    notes = []
    if "change" in overall:
        notes.append(
            f"CPT change {_share(overall['change'], 1)}, cosine between them {overall['cosine']:.2f}"
        )
    counts = ", ".join(f"{count:,} {role}" for role, count in rows.items() if count)
    notes += [f"rows: {counts}"] if counts else []
    ratio = log.summary.get("merge/ratio")
    about = "of the base's norm" + (
        f", added at ratio {number(ratio)}" if ratio is not None else ""
    )
    yield Tile("Chat vector", _share(overall["vector"], 1), about, notes)


def _swept(view: RunView) -> Iterator[Tile]:
    summary, merged = view.log(SWEEP).summary, view.log("merge").summary.get("merge/ratio")
    if "sweep/recommendation" not in summary:
        return
    ratio = summary.get("sweep/recommended_ratio")
    about = "recommended for the chat vector" if ratio is not None else "see below"
    notes = [f"the merge's ratio is {number(merged)}"] if merged is not None else []
    yield Tile("Ratio sweep", number(ratio), about, notes)
