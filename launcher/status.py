"""`cpt-merge status`: how far a run is, from its folder and from Slurm."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from cpt_merge.cluster.attempts import attempts
from cpt_merge.core.artifact import read_record
from cpt_merge.core.errors import UserError
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.launcher.stages import STAGES
from cpt_merge.tracking import STEP, read_log


def show_status(recipe: Recipe) -> None:
    """Print job, stage, step, rate, time left, newest checkpoint and where W&B shows the run."""
    run = recipe.directory
    if not run.is_dir():
        raise UserError(
            f"{run} does not exist: no job of this recipe has started yet (squeue --me shows who waits)."
        )
    lines = [*_job(run), *_stage(run), *_training(recipe), *_links(run)]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:{width}}  {text}")  # whole paths, to be copied


def _job(run: Path) -> list[tuple[str, str]]:
    found = attempts(run)
    if not found:
        return [("job", "none: not started by slurm/cpt_merge.sh")]
    last = found[-1]
    job = last.begun["job"]
    lines = [
        ("job", f"{job}, {_in_queue(job)}"),
        ("attempts", f"{len(found)}, the last on {last.begun['nodes']}"),
    ]
    if last.ended:
        lines.append((last.ended["verdict"], last.ended["reason"]))
    elif last.stopped:
        lines.append(("stopped", last.stopped["text"]))
    return [*lines, ("logs", str(last.folder))]


def _in_queue(job: str) -> str:
    """State, time left and reason to wait, by Slurm."""
    if not shutil.which("squeue"):
        return "squeue is not here, so its state is not known"
    done = subprocess.run(
        ["squeue", "-h", "-j", job, "-o", "%T|%L|%r|%N"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    if done.returncode or not done.stdout.strip():
        return "not in the queue any more (a new job would go on from here)"
    state, left, reason, nodes = done.stdout.strip().splitlines()[0].split("|")
    if state == "RUNNING":
        return f"running on {nodes}, {left} left of its time"
    return f"{state.lower()} ({reason})"


def _stage(run: Path) -> list[tuple[str, str]]:
    done = [stage.name for stage in STAGES if read_record(run / stage.name)]
    begun = [stage.name for stage in STAGES if (run / stage.name / "log" / "run.json").is_file()]
    current = [name for name in begun if name not in done]
    return [
        ("finished", ", ".join(done) or "nothing yet"),
        ("stage", current[-1] if current else "-"),
    ]


def _training(recipe: Recipe) -> list[tuple[str, str]]:
    folder = recipe.directory / "training"
    log = read_log(folder / "log")
    rows = [row for row in log.rows if "train/loss" in row]
    checkpoints = sorted(folder.glob("checkpoints/step-*/train_state.json"))
    lines = [
        (
            "newest checkpoint",
            f"{checkpoints[-1].parent}, {_ago(checkpoints[-1])}" if checkpoints else "none",
        )
    ]
    if not rows:
        return lines
    row, steps = rows[-1], recipe.training.steps
    rate = row["train/tokens_per_second"]
    left = (steps - row[STEP]) * recipe.training.tokens_per_step / rate if rate else 0.0
    words = [
        f"{row[STEP]:,.0f} of {steps:,}", f"loss {row['train/loss']:.3f}", f"{rate:,.0f} tokens/s",
        f"{_duration(left)} left at that rate", f"logged {_duration(time.time() - row['time'])} ago",
    ]  # fmt: skip
    return [("step", ", ".join(words)), *lines]


def _links(run: Path) -> list[tuple[str, str]]:
    """The W&B runs, where W&B has given an address."""
    lines = []
    for stage in STAGES:
        path = run / stage.name / "log" / "run.json"
        values: dict[str, Any] = (
            json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        )
        if values.get("url"):
            lines.append((f"W&B {stage.name}", str(values["url"])))
    return lines


def _ago(path: Path) -> str:
    return f"{_duration(time.time() - path.stat().st_mtime)} old"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{days} d" * bool(days), f"{hours} h" * bool(hours), f"{minutes} min" * bool(minutes)]
    return " ".join([part for part in parts if part][:2]) or f"{rest} s"
