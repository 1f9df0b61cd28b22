"""The losses of a fixed run, which change with the arithmetic, the order of the data or the schedule.

After an intended change, remove the file and run this test to write them again.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.conftest import FinishedRun

GOLDEN = Path(__file__).parent / "golden" / "losses.txt"


def test_losses_are_the_golden_ones(finished: Callable[..., FinishedRun]) -> None:
    losses = finished().losses
    if not GOLDEN.is_file():
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text("".join(f"{step} {loss:.6f}\n" for step, loss in losses.items()))
        pytest.fail(f"{GOLDEN} was missing and has been written; check and commit it")
    expected = [line.split() for line in GOLDEN.read_text().splitlines()]
    assert [int(step) for step, _ in expected] == list(losses)
    for step, loss in expected:
        assert losses[int(step)] == pytest.approx(float(loss), abs=2e-3), step
