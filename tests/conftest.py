"""What holds for every test.

Where a machine has GPUs, only the tests marked so (`make test-gpu`) see them; all others are of the CPU anywhere. A shell
that starts the tests in the background has Ctrl-C ignored in all that they start, which those of Ctrl-C must not be.
"""

import os
import signal

import pytest

from tests.processes import processes  # noqa: F401 (a fixture for every test)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
