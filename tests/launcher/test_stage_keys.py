"""A stage runs again exactly when a stage that it builds on has another result."""

import time
from pathlib import Path

import pytest

from cpt_merge.core.artifact import StageRecord, fingerprint, write_record
from cpt_merge.core.config import parse_section
from cpt_merge.core.errors import UserError
from cpt_merge.finetune import FinetuneConfig, FurtherTraining, PreferenceConfig
from cpt_merge.launcher.lineage import used
from cpt_merge.launcher.recipe import Recipe
from cpt_merge.launcher.run import Run
from cpt_merge.launcher.stage import prepare
from cpt_merge.launcher.stages import SWEEP, find_stage, pipeline

OF_CPT = {
    "tokenizer": set(),
    "embeddings": {"tokenizer"},
    "data": {"tokenizer"},
    "training": {"embeddings", "data"},
    "merge": {"training", "tokenizer"},
    "evaluation": {"training", "merge"},
}
OF_CONVERSATIONS = {**OF_CPT, "conversations": {"tokenizer", "embeddings"}}
OF_PAIRS = {"pairs": {"tokenizer", "embeddings"}}
BUILDS_ON: dict[tuple[str | None, bool], dict[str, set[str]]] = {  # by what is trained further
    (None, False): OF_CPT,
    ("merge", False): {
        **OF_CONVERSATIONS,
        "finetune": {"merge", "conversations"},
        "evaluation": {"training", "merge", "finetune"},
    },
    (None, True): {
        **OF_CPT,
        **OF_PAIRS,
        "dpo": {"merge", "pairs"},
        "evaluation": {"training", "merge", "dpo"},
    },
    ("training", True): {
        **OF_CONVERSATIONS,
        **OF_PAIRS,
        "format": {"training", "tokenizer"},
        "finetune": {"format", "conversations"},
        "finetune_merge": {"finetune", "conversations"},
        "dpo": {"finetune_merge", "pairs"},
        "evaluation": {"training", "merge", "finetune", "finetune_merge", "dpo"},
    },
}
CASES = [(*asked, name) for asked, stages in BUILDS_ON.items() for name in stages]


def finish(run: Run, stage: str, key: str) -> None:
    write_record(run.folder(stage), StageRecord(stage, key, {}, {}), time.time())


def further(recipe: Recipe, texts: Path, after: str | None, dpo: bool) -> Recipe:
    """The recipe, with fine-tuning and the comparison of replies if they are asked for."""
    sources = [{"path": str(texts / "ko.jsonl"), "language": "ko"}]
    sections: dict[str, FurtherTraining] = {}
    if after:
        values = {"sources": sources, "after": after}
        sections["finetune"] = parse_section(FinetuneConfig, values, "here")
    if dpo:
        sections["dpo"] = parse_section(PreferenceConfig, {"sources": sources}, "here")
    return recipe.model_copy(update=sections)


@pytest.mark.parametrize(("after", "dpo", "name"), CASES)
def test_the_key_of_a_stage_follows_from_the_stages_that_it_builds_on(
    recipe: Recipe, texts: Path, tmp_path: Path, after: str | None, dpo: bool, name: str
) -> None:
    run = Run(further(recipe, texts, after, dpo).model_copy(update={"runs": str(tmp_path)}))
    stage, expected = find_stage(run.recipe, name), BUILDS_ON[after, dpo][name]
    for other in pipeline(after, dpo):
        run.folder(other.name).mkdir(parents=True)
        finish(run, other.name, "first")
    before = prepare(run, stage).key
    changes = set()
    for other in pipeline(after, dpo):
        finish(run, other.name, "second")
        if prepare(run, stage).key != before:
            changes.add(other.name)
        finish(run, other.name, "first")
    assert changes == expected
    assert prepare(run, stage).key == before


@pytest.mark.parametrize(("after", "dpo"), BUILDS_ON)
def test_a_stage_comes_after_all_that_it_builds_on(after: str | None, dpo: bool) -> None:
    names = [stage.name for stage in pipeline(after, dpo)]
    assert set(names) == set(BUILDS_ON[after, dpo])
    for name, others in BUILDS_ON[after, dpo].items():
        assert all(names.index(other) < names.index(name) for other in others)


def test_a_stage_that_the_recipe_does_not_have_is_refused(recipe: Recipe, texts: Path) -> None:
    with pytest.raises(UserError, match="has no stage finetune, which needs the section `fine"):
        find_stage(recipe, "finetune")
    with pytest.raises(UserError, match="has no stage format, which needs after: training"):
        find_stage(further(recipe, texts, "merge", dpo=False), "format")
    with pytest.raises(UserError, match="has no stage pairs, which needs the section `dpo`"):
        find_stage(recipe, "pairs")


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
