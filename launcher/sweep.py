"""`cpt-merge sweep`: the ratio sweep of a finished run, in its folder `sweep`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cpt_merge.core.artifact import STAGE_FILE, StageRecord, stage_key, write_record
from cpt_merge.core.progress import say
from cpt_merge.core.world import find_world
from cpt_merge.launcher.pipeline import closing_on_error, hold_lock, open_tracker
from cpt_merge.launcher.recipe import load_recipe
from cpt_merge.launcher.stages import Run, merge_inputs, prompt_inputs
from cpt_merge.launcher.start import local_processes, start_processes, started_by_accelerate


def as_overrides(ratios: str | None, per_layer: str | None, trials: int | None) -> list[str]:
    """The command's options as overrides, which all processes get."""
    given = {
        "ratios": ratios and f'"{ratios}"',
        "per_layer": per_layer and f'"{per_layer}"',
        "search.trials": trials,
    }
    return [f"sweep.{name}={value}" for name, value in given.items() if value is not None]


def sweep(recipe_path: Path, overrides: list[str]) -> None:
    """Sweep the ratio of the recipe's chat vector. Raises `UserError` if the run is not trained."""
    recipe = load_recipe(recipe_path, overrides)
    run = Run(recipe)
    inputs = {
        **merge_inputs(run, run.finished("training")),
        **prompt_inputs(recipe),
        **run.corpus_inputs(),
    }
    hold_lock(run)
    processes = local_processes(recipe)
    if find_world().launcher == "alone" and processes > 1 and not started_by_accelerate():
        start_processes(recipe, "sweep", recipe_path, overrides, processes)
        return
    from cpt_merge.evaluation.sweep.run import SweepInputs
    from cpt_merge.evaluation.sweep.run import run as run_sweep
    from cpt_merge.merge.plan import MergeInputs

    out, main, started = run.folder("sweep"), find_world().is_main, time.time()
    if main:
        out.mkdir(parents=True, exist_ok=True)
        (out / STAGE_FILE).unlink(
            missing_ok=True
        )  # of a sweep before this one, whose points are kept
    config: dict[str, Any] = {
        name: getattr(recipe, name).model_dump() for name in ("sweep", "evaluation", "merge")
    }
    key = stage_key("sweep", config, inputs)
    tracker = open_tracker(run, "sweep", key, config, inputs)
    of_merge = MergeInputs(run.cpt, run.base, run.chat, run.tokenizer)
    given = SweepInputs(of_merge, recipe.corpus, recipe.tokenizer.languages(), inputs)
    with closing_on_error(tracker, "sweep"):
        results = run_sweep(recipe.sweep, recipe.evaluation, recipe.merge, given, out, tracker)
    if main:
        record = StageRecord(
            "sweep", key, config, inputs, results=results, tracking=tracker.record()
        )
        record = write_record(out, record, started)
        tracker.alert("sweep finished", f"{recipe.name}: in {record.seconds:,.0f} s")
    tracker.finish()
    say(f"sweep: done -> {out}")
