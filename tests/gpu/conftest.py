"""What the tests on a GPU share with those of training: the tiny model, its store."""

import pytest
import torch

from tests.training.conftest import corpus, model, store, tied_model  # noqa: F401 - fixtures


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu/" in item.nodeid:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(
                    pytest.mark.skip(reason="no GPU here, or not run by `make test-gpu`")
                )


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)
