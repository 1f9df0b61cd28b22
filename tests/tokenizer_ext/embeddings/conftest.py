from tests.merge.conftest import family, real_draw, recording, tracker, untied  # noqa: F401
