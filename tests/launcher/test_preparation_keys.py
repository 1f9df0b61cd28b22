"""Which stages a step of preparation concerns, and what is refused before the first stage."""

from pathlib import Path

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.launcher.recipe import load_recipe
from cpt_merge.launcher.stages import pipeline

READING = ["tokenizer", "data", "evaluation"]  # and embeddings, if they need text


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ("corpus.personal_data=[email]", READING),
        ("corpus.filters=[{language: ko}]", READING),
        ("corpus.sources.1.convert=s2tw", READING),
        ("data.near_duplicates=0.8", ["data"]),
    ],
)
def test_steps_of_reading_concern_every_stage_that_reads(
    change: str, stages: list[str], recipe_path: Path
) -> None:
    without = ["embeddings.input=mean"]
    one, other = load_recipe(recipe_path, without), load_recipe(recipe_path, [*without, change])
    changed = [
        stage.name
        for stage in pipeline(None, dpo=False)
        if dict(stage.config(one)) != dict(stage.config(other))
    ]
    assert changed == stages


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("corpus.personal_data=[names]", "personal_data"),
        ("corpus.filters=[{language: ja}]", "`corpus.filters` names ja, but the sources are in"),
        ("corpus.filters=[{language: ko, script: 1.5}]", "script"),
        ("corpus.filters=[{language: ko, minimum: 3}]", "unknown key .*minimum"),
        ("corpus.sources.0.convert=s2tw", "does not give text in ko"),
        ("corpus.sources.1.convert=s2x", "one of s2t, s2tw"),
        ("data.near_duplicates=80", "at most 1"),
        ("data.near_duplicates=0", "at least 0.3"),
    ],
)
def test_wrong_settings_are_one_sentence(change: str, message: str, recipe_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(recipe_path, [change])
