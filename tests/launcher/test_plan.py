"""`cpt-merge plan` for this machine."""

from pathlib import Path

import pytest

from cpt_merge.cluster.plan import ClusterOptions
from cpt_merge.launcher.plan import show_plan
from cpt_merge.launcher.recipe import load_recipe


def test_each_kind_of_phase_has_its_own_memory(
    recipe_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phases = "training.phases=[{train: new_rows, tokens: 1}, {train: vocabulary, tokens: 1}, {train: all}]"
    show_plan(load_recipe(recipe_path, [phases]))
    words = " ".join(capsys.readouterr().out.split())
    for kind in ("new_rows", "vocabulary", "all"):
        assert words.count(f"memory per rank, {kind} ") == 1
    show_plan(load_recipe(recipe_path, []))
    assert "memory per rank 0." in " ".join(capsys.readouterr().out.split())


def test_a_recipe_without_english_text_is_warned_about(
    recipe_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = ClusterOptions("h100", gpus_per_node=2)
    bf16 = "training.precision=bf16"
    show_plan(load_recipe(recipe_path, [bf16]), elsewhere)
    assert "no English text" not in " ".join(capsys.readouterr().out.split())
    without = [bf16, "corpus.sources.2.language=ja"]
    show_plan(load_recipe(recipe_path, without), elsewhere)
    assert "warning: there is no English text" in " ".join(capsys.readouterr().out.split())
