"""A chat model whose base is not published: trained itself, and led back to itself."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from cpt_merge.core.errors import UserError
from cpt_merge.launcher.recipe import load_recipe
from tests.command_line import cpt_merge

SETTINGS = ["models.base=null", "merge.method=interpolate", "merge.ratio=0.5"]


def test_a_recipe_without_a_base(recipe_path: Path) -> None:
    recipe = load_recipe(recipe_path, SETTINGS)
    assert recipe.models.base == recipe.models.chat
    with pytest.raises(UserError, match="`models` has no base, or the chat model as base"):
        load_recipe(recipe_path, SETTINGS[:1])
    with pytest.raises(UserError, match="interpolate needs a ratio: the chat model's share"):
        load_recipe(recipe_path, SETTINGS[:2])


@pytest.mark.slow
def test_the_whole_run(recipe_path: Path, tmp_path: Path) -> None:
    words = [*SETTINGS, f"runs={tmp_path}", "launch.processes=1", "evaluation.suites=[language]"]
    for command in ("plan", "run"):
        done = cpt_merge(command, recipe_path, *words)
        assert done.returncode == 0, done.stderr
    merged = load_file(tmp_path / "tiny" / "merge" / "chat" / "model.safetensors")
    cpt = load_file(tmp_path / "tiny" / "training" / "cpt" / "model.safetensors")
    assert set(merged) == set(cpt)
    assert (tmp_path / "tiny" / "merge" / "chat" / "chat_template.jinja").is_file()
