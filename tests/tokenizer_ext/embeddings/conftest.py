from tests.merge.conftest import family, real_draw, tracker, untied  # noqa: F401
