"""A stage runs again exactly when a stage that it builds on has another result."""

import time
from pathlib import Path

import pytest

from cpt_merge.core.artifact import StageRecord, fingerprint, write_record
from cpt_merge.core.errors import UserError
from cpt_merge.launcher.lineage import used
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stage import prepare
from cpt_merge.launcher.stages import STAGES, SWEEP, find_stage

BUILDS_ON = {
    "tokenizer": set(),
    "embeddings": {"tokenizer"},
    "data": {"tokenizer"},
    "training": {"embeddings", "data"},
    "merge": {"training", "tokenizer"},
    "evaluation": {"training", "merge"},
}


def finish(run: Run, stage: str, key: str) -> None:
    write_record(run.folder(stage), StageRecord(stage, key, {}, {}), time.time())


@pytest.mark.parametrize("name", BUILDS_ON)
def test_the_key_of_a_stage_follows_from_the_stages_that_it_builds_on(
    recipe: Recipe, tmp_path: Path, name: str
) -> None:
    run, stage = Run(recipe.model_copy(update={"runs": str(tmp_path)})), find_stage(name)
    for other in STAGES:
        run.folder(other.name).mkdir(parents=True)
        finish(run, other.name, "first")
    before = prepare(run, stage).key
    changes = set()
    for other in STAGES:
        finish(run, other.name, "second")
        if prepare(run, stage).key != before:
            changes.add(other.name)
        finish(run, other.name, "first")
    assert changes == BUILDS_ON[name]
    assert prepare(run, stage).key == before


def test_a_stage_comes_after_all_that_it_builds_on() -> None:
    names = [stage.name for stage in STAGES]
    assert set(names) == set(BUILDS_ON)
    for name, others in BUILDS_ON.items():
        assert all(names.index(other) < names.index(name) for other in others)


def test_a_sweep_of_an_exported_model_does_not_wait_for_the_training(
    recipe: Recipe, pair: Path, tmp_path: Path
) -> None:
    other = recipe.sweep.model_copy(update={"cpt": str(pair / "base")})
    run = Run(recipe.model_copy(update={"runs": str(tmp_path), "sweep": other}))
    run.folder("tokenizer").mkdir(parents=True)
    finish(run, "tokenizer", "first")
    context = prepare(run, SWEEP)
    assert context.inputs["cpt"] == fingerprint(pair / "base")
    assert [artifact.digest for artifact in used(context) if artifact.name.startswith("cpt-")] == [
        fingerprint(pair / "base")
    ]
    with pytest.raises(UserError, match="training is not finished"):
        prepare(Run(recipe.model_copy(update={"runs": str(tmp_path)})), SWEEP)
