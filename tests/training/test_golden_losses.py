"""The losses of a fixed run, written down once: a change of the arithmetic, the order or the schedule is seen.

To write them anew after a change that is meant, remove the file and run this test.
"""

from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.training.runs import Job, train

GOLDEN = Path(__file__).parent / "golden" / "losses.txt"


def test_losses_are_the_golden_ones(model: Path, store: Path, tmp_path: Path) -> None:
    losses = run_ranks(train, 1, Job(model, store, tmp_path))[0]
    if not GOLDEN.is_file():
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text("".join(f"{step} {loss:.6f}\n" for step, loss in losses.items()))
        pytest.fail(f"{GOLDEN} was missing and is written; look at it and commit it")
    expected = [line.split() for line in GOLDEN.read_text().splitlines()]
    assert [int(step) for step, _ in expected] == list(losses)
    for step, loss in expected:
        assert losses[int(step)] == pytest.approx(float(loss), abs=2e-3), step
