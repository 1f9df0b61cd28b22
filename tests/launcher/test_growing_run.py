"""A recipe with more tokens continues its training; nothing that was made is lost."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from cpt_merge.core.artifact import read_record
from cpt_merge.tracking import read_log
from tests.command_line import cpt_merge
from tests.tracking.wandb_log import attempts

LONGER = f"training.tokens={32 * 8 * 9}"


def copied(finished: Path, tmp_path: Path) -> tuple[Path, str]:
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(finished, run)
    return run, f"runs={tmp_path / 'runs'}"


@pytest.mark.slow
def test_more_tokens_continue_the_training_and_its_log(
    finished: Path, recipe_path: Path, tmp_path: Path
) -> None:
    run, runs = copied(finished, tmp_path)
    planned = cpt_merge("plan", recipe_path, runs, LONGER)
    sentence = "of 6 steps from step 6; the learning rate rises again from 0.1 of its peak"
    assert sentence in " ".join(planned.stderr.split() + planned.stdout.split()), planned.stderr
    done = cpt_merge("run", recipe_path, runs, LONGER)
    assert done.returncode == 0, done.stderr
    assert sentence in " ".join(done.stderr.split())
    before, now = read_record(run / "training.old-1"), read_record(run / "training")
    assert before
    assert now
    assert (run / "training.old-1" / "cpt" / "model.safetensors").is_file()
    grown = f"steps 1 to 6 of the 6 of {before.key}, then the learning rate rose again"
    assert now.results["grown"] == [grown]
    steps = [step for step, _ in read_log(run / "training" / "log").series("train/loss")]
    assert steps == [2, 4, 6, 8, 9]
    assert now.tracking["run_id"] == before.tracking["run_id"]
    assert len(attempts(run / "training" / "log")) > len(attempts(finished / "training" / "log"))
    assert not attempts(run / "training.old-1" / "log"), "W&B's files are with the longer run"
    again = cpt_merge("train", recipe_path, runs, LONGER)
    assert "finished already" in again.stderr
    back = cpt_merge("train", recipe_path, runs)
    assert back.returncode == 0, back.stderr
    assert "training.old-1 was made with these settings; it is taken back" in back.stderr


@pytest.mark.slow
def test_steps_that_are_done_again_at_another_rate_are_in_a_new_wandb_run(
    finished: Path, recipe_path: Path, tmp_path: Path
) -> None:
    run, runs = copied(finished, tmp_path)
    wsd = ["training.schedule.shape=wsd", "training.schedule.decay=0.4", "launch.processes=1"]
    short = cpt_merge("train", recipe_path, runs, *wsd)
    assert short.returncode == 0, short.stderr
    before = read_record(run / "training")
    done = cpt_merge("train", recipe_path, runs, *wsd, LONGER)
    assert done.returncode == 0, done.stderr
    assert "from step 4, where the learning rate had not begun to fall" in " ".join(
        done.stderr.split()
    )
    now = read_record(run / "training")
    assert before
    assert now
    assert now.tracking["run_id"] != before.tracking["run_id"]
    assert attempts(run / "training.old-2" / "log")
    steps = [step for step, _ in read_log(run / "training" / "log").series("train/loss")]
    assert steps == [2, 4, 6, 8, 9]


def test_budgets_of_sources_that_would_mean_other_shares_are_refused(
    finished: Path, recipe_path: Path, tmp_path: Path
) -> None:
    run, runs = copied(finished, tmp_path)
    values = yaml.safe_load(recipe_path.read_text())
    source = values["corpus"]["sources"][2]
    source["tokens"] = 300
    del source["weight"]
    recipe = tmp_path / "budget.yaml"
    recipe.write_text(yaml.safe_dump(values))
    begun = json.loads((run / "training" / "begun.json").read_text())
    begun["config"]["mixture"]["sources"][2].update(tokens=300, weight=None)
    (run / "training" / "begun.json").write_text(json.dumps(begun))
    planned = cpt_merge("plan", recipe, runs, LONGER)
    assert planned.returncode == 2, planned.stdout
    words = " ".join(planned.stderr.split())
    assert "en 19.53% instead of 13.02%" in words, words
    assert "multiply their `tokens` and `epochs` by 1.5" in words


def test_other_settings_start_again_and_the_plan_says_so(
    finished: Path, recipe_path: Path, tmp_path: Path
) -> None:
    _, runs = copied(finished, tmp_path)
    planned = cpt_merge("plan", recipe_path, runs, LONGER, "training.seed=1")
    words = " ".join(planned.stderr.split() + planned.stdout.split())
    assert "training: it starts from the first step" in words, words
    assert "tokens" in words
    assert "seed" in words
    assert "training.old-1" in words
