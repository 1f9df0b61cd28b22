"""CPT, CPT + FT, CPT + vector and CPT + FT + vector over several seeds, on the demo's world.

    python -m cpt_merge.recipes.demo.prepare --out runs/demo-inputs
    python -m benchmarks.finetuning run OUT [--seeds 0,1,2] [--conversations 200]
    python -m benchmarks.finetuning table OUT

Each seed is a run of recipes/demo.yaml with a seed and a section `finetune`, and then the same run
with `finetune.after: merge`, whose CPT is taken over. Fine-tuning reads so many conversations in
each new language, of requests that the prompts do not have. The table has the mean over the seeds
and its 95 % interval by Student's t, which says how much another seed would differ, not another
world.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import typer

from cpt_merge.recipes.demo.corpus import CorpusSettings, build_language

RECIPE = Path("recipes/demo.yaml")
LANGUAGES = ("zh_tw", "ko")
SHOWN = ("zh_tw", "ko", "en")
METRICS = ("chat", "bits_per_byte")
LABELS = {
    "training": {
        "base": "base", "chat": "chat", "cpt": "CPT", "tuned": "CPT + FT",
        "merged": "CPT + vector", "tuned_merged": "CPT + FT + vector",
    },
    "merge": {"tuned": "CPT + vector + FT"},
}  # fmt: skip
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile by the number of seeds

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    out: Path,
    seeds: str = "0,1,2",
    conversations: int = 200,
    epochs: float = 3.0,
    learning_rate: float = 2e-4,
) -> None:
    """Run every seed in both orders, and keep the evaluations in OUT."""
    out.mkdir(parents=True, exist_ok=True)
    sources = [_write(out, language, conversations) for language in LANGUAGES]
    for seed in seeds.split(","):
        for after in LABELS:
            kept = out / f"{after}-{seed}.json"
            if kept.is_file():
                continue
            settings = [
                f"name=seed-{seed}", f"runs={out}", f"training.seed={seed}",
                f"finetune.sources=[{', '.join(sources)}]", f"finetune.after={after}",
                f"finetune.epochs={epochs}", f"finetune.learning_rate={learning_rate}",
                "finetune.sequence_length=256", "finetune.global_batch_size=2",
                "finetune.heldout=0.1", "finetune.evaluate_every=10",
                "evaluation.suites=[language,chat]", "launch.processes=1",
                "tracking.mode=disabled",
            ]  # fmt: skip
            command = [sys.executable, "-m", "cpt_merge", "run", str(RECIPE), *settings]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            shutil.copy(out / f"seed-{seed}" / "evaluation" / "results.json", kept)
    table(out)


def _write(out: Path, language: str, count: int) -> str:
    """Write the first conversations in a language; the source, as in a recipe."""
    path = out / f"chat-{language}.jsonl"
    chosen = build_language(language, CorpusSettings()).conversations[:count]
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
    """The mean of every model's metrics over the seeds, as Markdown."""
    print(f"| | {' | '.join(f'{metric}: {one}' for metric in METRICS for one in SHOWN)} |")
    print(f"|---|{'---|' * (len(METRICS) * len(SHOWN))}")
    for after, labels in LABELS.items():
        found = [
            json.loads(path.read_text(encoding="utf-8"))["models"]
            for path in sorted(out.glob(f"{after}-*.json"))
        ]
        for model, label in labels.items():
            cells = [
                _cell([one[model]["scores"][language][metric]["value"] for one in found], metric)
                for metric in METRICS
                for language in SHOWN
            ]
            print(f"| {label} | {' | '.join(cells)} |")


def _cell(values: list[float], metric: str) -> str:
    mean, form = statistics.fmean(values), "{:.0%}" if metric == "chat" else "{:.2f}"
    if len(values) < 2 or max(values) == min(values):
        return form.format(mean)
    half = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{form.format(mean)} ± {form.format(half)}"


if __name__ == "__main__":
    app()
