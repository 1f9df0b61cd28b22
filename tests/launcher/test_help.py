"""`--help` is short; `--help-all` has everything."""

from cpt_merge.launcher.recipe import Recipe
from cpt_merge.launcher.reference import recipe_keys
from tests.command_line import cpt_merge


def test_help_is_short_and_names_the_way_to_everything() -> None:
    done = cpt_merge("--help")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) < 25
    assert "--help-all" in done.stdout
    assert "\n  init " in done.stdout
    assert "check-tokenizer" not in done.stdout


def test_help_all_lists_every_command_and_key() -> None:
    done = cpt_merge("--help-all")
    assert done.returncode == 0
    assert "\n  check-tokenizer " in done.stdout
    assert [key.path for key in recipe_keys(Recipe) if f"\n{key.path}\n" not in done.stdout] == []
