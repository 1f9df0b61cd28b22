from tests.merge.conftest import family, no_garbage_collection, recording, tracker, untied  # noqa: F401
