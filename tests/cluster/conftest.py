from tests.launcher.conftest import finished, pair, recipe, recipe_path, shared, texts  # noqa: F401
