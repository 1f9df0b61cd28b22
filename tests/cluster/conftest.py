from tests.launcher.conftest import finished, pair, recipe, recipe_path  # noqa: F401
