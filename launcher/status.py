"""`cpt-merge status`: how far a run is, from its folder and from Slurm."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from cpt_merge.cluster.attempts import attempts
from cpt_merge.cluster.slurm import describe_job
from cpt_merge.core.artifact import read_record
from cpt_merge.core.errors import UserError
from cpt_merge.launcher.loops import loops_of
from cpt_merge.launcher.recipe import load_recipe
from cpt_merge.launcher.stages import STAGE_NAMES
from cpt_merge.tracking import STEP, read_log
from cpt_merge.training import TrainingConfig

Lines = list[tuple[str, str]]  # (label, text)


def show_status(run: Path, overrides: list[str]) -> None:
    """Print job, stage, step, rate, time left, newest checkpoint and the run's pages at W&B.

    `run` is a recipe or the folder of a run, whose logs hold its recipe. Raises `UserError`.
    """
    if run.is_dir():
        if overrides:
            raise UserError(f"{run} is a run's folder; give its recipe to override keys.")
        folder, recipe = run, _logged_recipe(run)
    else:
        loaded = load_recipe(run, overrides)
        folder, recipe = loaded.directory, loaded.model_dump(mode="json")
        if not folder.is_dir():
            raise UserError(
                f"{folder} does not exist: no job of this recipe has started yet "
                "(squeue --me lists those that wait)."
            )
    loops = loops_of(folder, recipe)
    begun = [name for name in loops if (folder / name / "log" / "run.json").is_file()]
    current = begun[-1] if begun else "training"
    lines = [*_job(folder), *_stage(folder), *_training(folder / current, loops[current])]
    lines += _links(folder)
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        print(f"{label:{width}}  {text}")  # unwrapped, so that paths can be copied


def _logged_recipe(run: Path) -> dict[str, Any]:
    """The recipe in the newest log. Raises `UserError` if the folder has no log."""
    logs = [run / name / "log" / "run.json" for name in STAGE_NAMES]
    logs = sorted(filter(Path.is_file, logs), key=lambda path: path.stat().st_mtime)
    if not logs:
        raise UserError(
            f"{run} has no log of a stage, so its recipe is not known; write "
            "`cpt-merge status RECIPE`."
        )
    settings = json.loads(logs[-1].read_text(encoding="utf-8"))["settings"]
    return dict(settings["recipe"])


def _job(run: Path) -> Lines:
    found = attempts(run)
    if not found:
        return [("job", "none: this run was not started by slurm/cpt_merge.sh")]
    last = found[-1]
    job = last.begun["job"]
    lines = [
        ("job", f"{job}, {describe_job(job)}"),
        ("attempts", f"{len(found)}, the last on {last.begun['nodes']}"),
    ]
    if last.ended:
        lines.append((last.ended["verdict"], last.ended["reason"]))
    elif last.stopped:
        lines.append(("stopped", last.stopped["text"]))
    return [*lines, ("logs", str(last.folder))]


def _stage(run: Path) -> Lines:
    done = [name for name in STAGE_NAMES if read_record(run / name)]
    begun = [name for name in STAGE_NAMES if (run / name / "log" / "run.json").is_file()]
    current = [name for name in begun if name not in done]
    return [
        ("finished", ", ".join(done) or "nothing yet"),
        ("stage", current[-1] if current else "-"),
    ]


def _training(folder: Path, config: TrainingConfig) -> Lines:
    now = time.time()
    newest = max(folder.glob("checkpoints/step-*/train_state.json"), default=None)
    checkpoint = "none"
    if newest:
        checkpoint = f"{newest.parent}, {_duration(now - newest.stat().st_mtime)} old"
    lines = [("newest checkpoint", checkpoint)]
    rows = [row for row in read_log(folder / "log").rows if "train/loss" in row]
    if not rows:
        return lines
    row, steps = rows[-1], config.steps
    rate = row["train/tokens_per_second"]
    left = (steps - row[STEP]) * config.tokens_per_step / rate if rate else 0.0
    step = (
        f"{row[STEP]:,.0f} of {steps:,}, loss {row['train/loss']:.3f}, {rate:,.0f} tokens/s, "
        f"{_duration(left)} left at that rate, logged {_duration(now - row['time'])} ago"
    )
    return [("step", step), *lines]


def _links(run: Path) -> Lines:
    """The pages of the W&B runs whose address is known."""
    lines = []
    for stage in STAGE_NAMES:
        path = run / stage / "log" / "run.json"
        if path.is_file():
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if values.get("url"):
                lines.append((f"W&B {stage}", str(values["url"])))
    return lines


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{days} d" * bool(days), f"{hours} h" * bool(hours), f"{minutes} min" * bool(minutes)]
    return " ".join([part for part in parts if part][:2]) or f"{rest} s"
