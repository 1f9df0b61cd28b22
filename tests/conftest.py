"""Where a machine has GPUs, only the tests marked so (`make test-gpu`) see them; all others are of the CPU anywhere."""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
