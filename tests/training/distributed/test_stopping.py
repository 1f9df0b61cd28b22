"""A request to stop, at any rank and moment: all save at one micro-batch and resume exactly."""

import os
import time
from pathlib import Path

import pytest

from cpt_merge.core.deadline import STOP_AT
from cpt_merge.core.distributed import stop_process_group
from cpt_merge.training.distributed.checkpoint import STATE_FILE
from cpt_merge.training.distributed.parallel import start_parallel
from cpt_merge.training.distributed.stopping import StopRequest
from tests.distributed import run_ranks
from tests.training.runs import Job, ask_for, assert_same_weights, train


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["evaluation", "save"])
def test_within_an_evaluation_or_a_save(
    moment: str, model: Path, store: Path, tmp_path: Path
) -> None:
    whole = run_ranks(train, 2, Job(model, store, tmp_path / "whole"))[0]
    job = Job(model, store, tmp_path / "parts", signal_in=moment)
    first = run_ranks(train, 2, job)[0]
    assert max(first, default=0) < 12
    job.signal_in = ""
    second = run_ranks(train, 2, job)[0]
    assert {**first, **second} == whole
    assert set(first).isdisjoint(second), "no step that was saved is repeated"
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def train_until(job: Job, seconds: float) -> dict[int, float]:
    os.environ[STOP_AT] = str(time.time() + seconds)
    return train(job)


@pytest.mark.slow
def test_a_deadline_is_a_request(model: Path, store: Path, tmp_path: Path) -> None:
    """`--stop-at` or the end of the Slurm job, minus the margin."""
    job = Job(
        model, store, tmp_path, {"tokens": 32 * 8 * 100_000, "stop_margin": 60}, stop_after=10**9
    )
    losses = run_ranks(train_until, 2, job, 75.0)[0]
    assert 0 < max(losses) < 100_000
    assert len(list((tmp_path / "checkpoints").glob(f"step-*/{STATE_FILE}"))) > 0


@pytest.mark.slow
def test_before_the_first_step_there_is_nothing_to_save(
    model: Path, store: Path, tmp_path: Path
) -> None:
    """torch cannot write the state of an optimizer before its first step without making one."""
    whole = run_ranks(train, 2, Job(model, store, tmp_path / "whole"))[0]
    job = Job(model, store, tmp_path / "parts", stop_after=10**9)
    assert run_ranks(train_until, 2, job, 0.0)[0] == {}
    assert run_ranks(train, 2, job)[0] == whole


REQUESTS = [(1, "asked"), (1, "trouble"), (None, "")]  # the rank that wants to stop, and why


def votes() -> list[list[bool]]:
    """For each request, what four votes give; the rank asks after the first one."""
    ask_for("fsdp2")
    parallel, found = start_parallel(), []
    for rank, reason in REQUESTS:
        with StopRequest(parallel, 0) as stop:
            given = [stop.agreed()]
            if parallel.rank == rank and reason == "trouble":
                stop.report_trouble()
            elif parallel.rank == rank:
                stop.reason = reason
            found.append(given + [stop.agreed() for _ in range(3)])
    stop_process_group()
    return found


def test_one_vote_is_enough_and_known_to_all_at_the_same_call() -> None:
    agreed = [False, False, True, True]
    assert run_ranks(votes, 2) == [[agreed, agreed, [False] * 4]] * 2
