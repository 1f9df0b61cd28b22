"""The Chat Vector paper's table and two questions of its reviewers, at the scale of the demo.

    python -m cpt_merge.recipes.demo.prepare --out runs/demo-inputs
    python -m benchmarks.paper run OUT [--seeds 0,1,2]      # every row, for each seed
    python -m benchmarks.paper table OUT
    python -m benchmarks.paper grid OUT [--seeds 0,1,2]     # tokens of CPT x ratio of the vector
    python -m benchmarks.paper curves OUT

`run` is recipes/demo.yaml with other keys (`RUNS`), so any recipe's rows are made in the same way.
Runs of one name share their CPT. Each evaluation is kept in OUT/SEED/, from where `cpt-merge
compare` puts a seed's rows side by side, with p-values. Tables have the mean over the seeds and its
95 % interval by Student's t, which says how much another seed would differ, not another world.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from cpt_merge.recipes.demo.corpus import CorpusSettings, build_language

RECIPE = "recipes/demo.yaml"
NEW, SHOWN = ("zh_tw", "ko"), ("zh_tw", "ko", "en")
CONVERSATIONS = 200  # of fine-tuning, in each new language; of requests that no prompt has
METRICS = {"chat": "{:.0%}", "bits_per_byte": "{:.2f}"}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile by the number of seeds
TOKENS = (175_000, 350_000, 700_000, 1_400_000)
RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class PaperRun:
    """A run of the table, and which of its models are rows."""

    label: str  # of its evaluation
    run: str  # runs of one name share what their keys do not change
    rows: Mapping[str, str]  # model -> row
    keys: tuple[str, ...] = ()
    tuned: bool = True


RUNS = (
    PaperRun(
        "vector", "main",
        {
            "base": "base", "chat": "chat", "cpt": "CPT", "tuned": "CPT + FT",
            "merged": "CPT + vector", "tuned_merged": "CPT + FT + vector",
        },
    ),
    PaperRun(
        "half", "main",
        {"merged": "CPT + 0.5 x vector", "tuned_merged": "CPT + FT + 0.5 x vector"},
        ("merge.ratio=0.5",),
    ),
    PaperRun("after", "main", {"tuned": "CPT + vector + FT"}, ("finetune.after=merge",)),
    PaperRun(
        "from_chat", "from_chat", {"cpt": "chat -> CPT", "tuned": "chat -> CPT -> FT"},
        ("training.start=runs/demo-inputs/chat",),
    ),
    PaperRun(
        "no_extension", "no_extension",
        {"cpt": "CPT, no extension", "merged": "CPT + vector, no extension"},
        ("tokenizer.new_pieces={}",), tuned=False,
    ),
)  # fmt: skip


@app.command()
def run(out: Path, seeds: str = "0,1,2", recipe: str = RECIPE) -> None:
    """Make and evaluate every row of every seed. What is there already is not made again."""
    out.mkdir(parents=True, exist_ok=True)
    sources = ", ".join(_write(out, language) for language in NEW)
    tuning = (
        f"finetune.sources=[{sources}]", "finetune.epochs=3", "finetune.learning_rate=2e-4",
        "finetune.sequence_length=256", "finetune.global_batch_size=2", "finetune.heldout=0.1",
        "finetune.evaluate_every=50",
    )  # fmt: skip
    for seed in seeds.split(","):
        for one in RUNS:
            kept = out / seed / one.label
            if kept.is_dir():
                continue
            runs = out / "runs" / seed
            keys = [*(tuning if one.tuned else ()), *one.keys, *_common(one.run, runs, seed)]
            _call("run", recipe, *keys, "evaluation.suites=[language,chat]")
            shutil.copytree(runs / one.run / "evaluation", kept)
    table(out)


def _common(name: str, runs: Path, seed: str) -> list[str]:
    return [
        f"name={name}", f"runs={runs}", f"training.seed={seed}", "launch.processes=1",
        "tracking.mode=disabled",
    ]  # fmt: skip


def _call(*words: str) -> None:
    command = [sys.executable, "-m", "cpt_merge", *words]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _write(out: Path, language: str) -> str:
    """Write the first conversations in a language; the source, as in a recipe."""
    path = out / f"chat-{language}.jsonl"
    chosen = build_language(language, CorpusSettings()).conversations[:CONVERSATIONS]
    rows = [
        {
            "messages": [
                {"role": ("user", "assistant")[place % 2], "content": turn}
                for place, turn in enumerate(turns)
            ]
        }
        for turns in chosen
    ]
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    return f"{{path: {path}, language: {language}}}"


@app.command()
def table(out: Path) -> None:
    """The mean of every row's metrics over the seeds, as Markdown."""
    _row("", [f"{metric}: {language}" for metric in METRICS for language in SHOWN])
    _row("---", ["---"] * len(METRICS) * len(SHOWN))
    for one in RUNS:
        found = [_read(path)["models"] for path in sorted(out.glob(f"*/{one.label}/results.json"))]
        for model, row in one.rows.items():
            cells = [
                _cell([of[model]["scores"][language][metric]["value"] for of in found], form)
                for metric, form in METRICS.items()
                for language in SHOWN
            ]
            _row(row, cells)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _row(first: str, cells: Sequence[str]) -> None:
    print(f"| {first} | {' | '.join(cells)} |")


def _cell(values: Sequence[float], form: str) -> str:
    mean = statistics.fmean(values)
    if len(values) < 2 or max(values) == min(values):
        return form.format(mean)
    half = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{form.format(mean)} ± {form.format(half)}"


@app.command()
def grid(out: Path, seeds: str = "0,1,2", recipe: str = RECIPE) -> None:
    """Grow a run of each seed from the fewest tokens to the most; sweep the ratio at each."""
    ratios = f"sweep.ratios={list(RATIOS)}"
    for seed in seeds.split(","):
        for tokens in TOKENS:
            kept = out / seed / f"grid-{tokens}.json"
            if kept.is_file():
                continue
            runs = out / "runs" / seed
            keys = [
                *_common("grid", runs, seed), f"training.tokens={tokens}",
                "training.schedule.shape=wsd", ratios,
            ]  # fmt: skip
            for stage in ("tokenizer", "embeddings", "data", "train", "sweep"):
                _call(stage, recipe, *keys)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(runs / "grid" / "sweep" / "results.json", kept)
    curves(out)


@app.command()
def curves(out: Path) -> None:
    """`chat` and the rise of bits per byte over CPT, by tokens and ratio, as Markdown."""
    for metric, form in METRICS.items():
        for language in SHOWN:
            _row(f"{metric}, {language}", [f"ratio {ratio:g}" for ratio in RATIOS])
            _row("---", ["---"] * len(RATIOS))
            for tokens in TOKENS:
                found = [
                    dict(_points(_read(path), language, metric))
                    for path in sorted(out.glob(f"*/grid-{tokens}.json"))
                ]
                cells = [_cell([one[ratio] for one in found], form) for ratio in RATIOS]
                _row(f"{tokens:,} tokens", cells)
            print()


def _points(results: dict[str, Any], language: str, metric: str) -> Iterator[tuple[float, float]]:
    """The value of a metric at each ratio."""
    for point in results["points"]:
        ratio = point["ratios"].get("all")
        if ratio is not None:
            yield ratio, point["metrics"][language][metric]["value"]


if __name__ == "__main__":
    app()
