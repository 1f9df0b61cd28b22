"""A stage runs again exactly when a stage that it builds on has another result."""

import time
from pathlib import Path

import pytest

from cpt_merge.core.artifact import StageRecord, fingerprint, write_record
from cpt_merge.core.config import parse_section
from cpt_merge.core.errors import UserError
from cpt_merge.finetune import FinetuneConfig
from cpt_merge.launcher.lineage import used
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stage import prepare
from cpt_merge.launcher.stages import PIPELINES, SWEEP, find_stage

OF_CPT = {
    "tokenizer": set(),
    "embeddings": {"tokenizer"},
    "data": {"tokenizer"},
    "training": {"embeddings", "data"},
    "merge": {"training", "tokenizer"},
    "evaluation": {"training", "merge"},
}
OF_CONVERSATIONS = {**OF_CPT, "conversations": {"tokenizer", "embeddings"}}
BUILDS_ON: dict[str | None, dict[str, set[str]]] = {  # by what is fine-tuned
    None: OF_CPT,
    "training": {
        **OF_CONVERSATIONS,
        "format": {"training", "tokenizer"},
        "finetune": {"format", "conversations"},
        "finetune_merge": {"finetune", "conversations"},
        "evaluation": {"training", "merge", "finetune", "finetune_merge"},
    },
    "merge": {
        **OF_CONVERSATIONS,
        "finetune": {"merge", "conversations"},
        "evaluation": {"training", "merge", "finetune"},
    },
}
CASES = [(after, name) for after, stages in BUILDS_ON.items() for name in stages]


def finish(run: Run, stage: str, key: str) -> None:
    write_record(run.folder(stage), StageRecord(stage, key, {}, {}), time.time())


def tuned(recipe: Recipe, texts: Path, after: str | None) -> Recipe:
    """The recipe, with fine-tuning if there is any."""
    if after is None:
        return recipe
    finetune = {"sources": [{"path": str(texts / "ko.jsonl"), "language": "ko"}], "after": after}
    section = parse_section(FinetuneConfig, finetune, "here")
    return recipe.model_copy(update={"finetune": section})


@pytest.mark.parametrize(("after", "name"), CASES)
def test_the_key_of_a_stage_follows_from_the_stages_that_it_builds_on(
    recipe: Recipe, texts: Path, tmp_path: Path, after: str | None, name: str
) -> None:
    run = Run(tuned(recipe, texts, after).model_copy(update={"runs": str(tmp_path)}))
    stage = find_stage(run.recipe, name)
    for other in PIPELINES[after]:
        run.folder(other.name).mkdir(parents=True)
        finish(run, other.name, "first")
    before = prepare(run, stage).key
    changes = set()
    for other in PIPELINES[after]:
        finish(run, other.name, "second")
        if prepare(run, stage).key != before:
            changes.add(other.name)
        finish(run, other.name, "first")
    assert changes == BUILDS_ON[after][name]
    assert prepare(run, stage).key == before


@pytest.mark.parametrize("after", BUILDS_ON)
def test_a_stage_comes_after_all_that_it_builds_on(after: str | None) -> None:
    names = [stage.name for stage in PIPELINES[after]]
    assert set(names) == set(BUILDS_ON[after])
    for name, others in BUILDS_ON[after].items():
        assert all(names.index(other) < names.index(name) for other in others)


def test_a_stage_that_the_recipe_does_not_have_is_refused(recipe: Recipe, texts: Path) -> None:
    with pytest.raises(UserError, match="has no stage finetune, which needs the section `fine"):
        find_stage(recipe, "finetune")
    with pytest.raises(UserError, match="has no stage format, which needs after: training"):
        find_stage(tuned(recipe, texts, "merge"), "format")


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
