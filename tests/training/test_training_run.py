"""The training stage in real processes: equal to plain torch, exact on resume, at any world size."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.data.packing import TrainingSequences
from cpt_merge.data.store import Store
from cpt_merge.launcher.accelerate_file import backend_environment
from tests.distributed import run_ranks
from tests.training.conftest import FinishedRun
from tests.training.runs import (
    ROOT,
    Job,
    assert_same_weights,
    reference_losses,
    reference_steps,
    train,
)

BACKENDS = [("fsdp2", 1), ("fsdp2", 2), ("hsdp", 4), ("zero1", 2), ("zero2", 2), ("zero3", 2)]
TWO_PHASES = [{"train": "vocabulary", "tokens": 6 * 32 * 8}, {"train": "all"}]


def backends(*quick: tuple[str, int]) -> list[object]:
    """All of them; those that are not quick only in `make test-all`."""
    return [
        pytest.param(
            *pair, id=f"{pair[0]}-{pair[1]}", marks=[] if pair in quick else [pytest.mark.slow]
        )
        for pair in BACKENDS
    ]


@pytest.mark.parametrize(("backend", "size"), backends(("fsdp2", 1), ("fsdp2", 2), ("zero2", 2)))
@pytest.mark.parametrize(
    "tied", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["untied", "tied"]
)
def test_equals_a_plain_single_process_reference(
    backend: str,
    size: int,
    tied: bool,
    model: Path,
    tied_model: Path,
    store: Path,
    finished: Callable[..., FinishedRun],
) -> None:
    """Gradient norms too, since clipping hides a wrong factor of the gradient from the losses."""
    steps = finished(backend, size, tied).steps
    expected = reference_steps(tied_model if tied else model, store)
    assert list(steps) == list(expected) == list(range(1, 13))
    assert steps[12][0] < steps[1][0] - 0.5
    for step, (loss, norm) in steps.items():
        assert loss == pytest.approx(expected[step][0], rel=2e-4), step
        assert norm == pytest.approx(expected[step][1], rel=2e-3), step


@pytest.mark.parametrize(("backend", "size"), backends(("fsdp2", 2)))
def test_stopped_by_a_signal_to_one_rank_and_resumed_it_is_bit_for_bit_the_same(
    backend: str,
    size: int,
    model: Path,
    store: Path,
    finished: Callable[..., FinishedRun],
    tmp_path: Path,
) -> None:
    whole, stopped = finished(backend, size), finished(backend, size, stop_after=5)
    first, parts = stopped.losses, stopped.copied_to(tmp_path / "parts")
    assert max(first) in (5, 6)
    assert not (parts / "cpt").exists()
    second = run_ranks(train, size, Job(model, store, parts, backend=backend))[0]
    assert min(second) == max(first) + 1
    assert {**first, **second} == whole.losses
    assert_same_weights(whole.out, parts)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("fsdp2", 2), ("fsdp2", 1)),
        pytest.param(("fsdp2", 2), ("fsdp2", 4), marks=pytest.mark.slow),
        pytest.param(("fsdp2", 2), ("hsdp", 4), marks=pytest.mark.slow),
        pytest.param(("hsdp", 4), ("fsdp2", 2), marks=pytest.mark.slow),
        pytest.param(("zero2", 2), ("zero2", 1), marks=pytest.mark.slow),
        pytest.param(("zero1", 2), ("zero3", 4), marks=pytest.mark.slow),
        pytest.param(("zero3", 2), ("zero1", 4), marks=pytest.mark.slow),
        pytest.param(("zero3", 2), ("zero2-offload", 4), marks=pytest.mark.slow),
        pytest.param(("zero3-offload", 2), ("zero3", 1), marks=pytest.mark.slow),
        pytest.param(("fsdp2", 2), ("zero2", 2), marks=pytest.mark.slow),
        pytest.param(("zero3", 2), ("fsdp2", 4), marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_continues_at_another_size_and_layout(
    before: tuple[str, int],
    after: tuple[str, int],
    model: Path,
    store: Path,
    finished: Callable[..., FinishedRun],
    tmp_path: Path,
) -> None:
    whole, stopped = finished().losses, finished(*before, stop_after=5)
    first, parts = stopped.losses, stopped.copied_to(tmp_path / "parts")
    second = run_ranks(train, after[1], Job(model, store, parts, backend=after[0]))[0]
    assert min(second) == max(first) + 1
    assert max(second) == 12
    for step, loss in second.items():
        assert loss == pytest.approx(whole[step], rel=1e-4)


def train_in_a_group_of_one(job: Job) -> dict[int, float]:
    os.environ.update(backend_environment(ROOT / "recipes" / "accelerate" / "fsdp2.yaml"))
    return train(job)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tied", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["untied", "tied"]
)
@pytest.mark.parametrize(
    "more",
    [
        {},
        pytest.param(
            {"activation_checkpointing": "full", "phases": TWO_PHASES}, marks=pytest.mark.slow
        ),
    ],
    ids=["plain", "phases"],
)
def test_bf16_on_one_process_is_bit_for_bit_what_fsdp2_computes(
    more: dict[str, Any], tied: bool, model: Path, tied_model: Path, store: Path, tmp_path: Path
) -> None:
    chosen, changes = tied_model if tied else model, {"precision": "bf16", **more}
    losses = run_ranks(train, 1, Job(chosen, store, tmp_path / "alone", changes))[0]
    job = Job(chosen, store, tmp_path / "group", changes)
    assert run_ranks(train_in_a_group_of_one, 1, job)[0] == losses
    assert_same_weights(tmp_path / "alone", tmp_path / "group")
    mixed = Job(chosen, store, tmp_path / "mixed", changes, stop_after=5)
    run_ranks(train_in_a_group_of_one, 1, mixed)
    mixed.stop_after = 0
    run_ranks(train, 1, mixed)
    assert_same_weights(tmp_path / "alone", tmp_path / "mixed")


def test_a_step_whose_gradient_is_not_finite_changes_nothing(
    model: Path, store: Path, tmp_path: Path
) -> None:
    """One rank's NaN: all ranks skip the step and count it, and the run continues."""
    losses = run_ranks(train, 2, Job(model, store, tmp_path, poison=range(5, 7)))[0]
    assert [step for step, loss in losses.items() if loss != loss] == [6, 7]
    assert losses[12] < losses[1] - 0.5
    state = json.loads(
        (tmp_path / "checkpoints" / "step-00000012" / "train_state.json").read_text()
    )
    assert state["callbacks"]["nonfinite"]["in_a_row"] == 0


@pytest.mark.parametrize(
    ("step", "stop_after"), [(5, 6), (11, 0)], ids=["stopped after it", "the last step"]
)
def test_a_single_such_step_ends_nothing(
    step: int, stop_after: int, model: Path, store: Path, tmp_path: Path
) -> None:
    """The weights are those of the step before, so they can be saved and exported."""
    losses = run_ranks(
        train, 2, Job(model, store, tmp_path, poison=range(step, step + 1), stop_after=stop_after)
    )[0]
    assert [step for step, loss in losses.items() if loss != loss] == [step + 1]
    state = json.loads(max((tmp_path / "checkpoints").glob("step-*/train_state.json")).read_text())
    in_a_row = state["callbacks"]["nonfinite"]["in_a_row"]
    assert (state["step"], in_a_row) == (max(losses), max(losses) == step + 1)


@pytest.mark.parametrize("backend", ["fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_after_too_many_such_steps_it_stops_and_names_the_last_good_checkpoint(
    backend: str, model: Path, store: Path, tmp_path: Path
) -> None:
    job = Job(model, store, tmp_path, {"max_skipped_steps": 2}, backend, poison=range(5, 9))
    with pytest.raises(
        AssertionError, match=r"2 steps in a row had a non-finite gradient.*step-00000004"
    ):
        run_ranks(train, 2, job)


def test_a_checkpoint_of_another_configuration_is_refused(
    model: Path, store: Path, finished: Callable[..., FinishedRun], tmp_path: Path
) -> None:
    out = finished().copied_to(tmp_path / "out")
    state = max((out / "checkpoints").glob("step-*/train_state.json"))
    state.write_text(state.read_text().replace('"key": "key"', '"key": "other"'))
    with pytest.raises(AssertionError, match="belongs to another configuration or model"):
        run_ranks(train, 1, Job(model, store, out))


def test_what_does_not_fit_is_one_sentence(model: Path, store: Path, tmp_path: Path) -> None:
    with pytest.raises(
        AssertionError, match="global_batch_size = 7 does not divide over 2 processes"
    ):
        run_ranks(train, 2, Job(model, store, tmp_path, {"global_batch_size": 7}))
    with pytest.raises(AssertionError, match="2 processes do not make 2 replicas of 2 shards"):
        run_ranks(train, 2, Job(model, store, tmp_path, backend="hsdp"))
    with pytest.raises(UserError, match="fewer than one sequence"):
        TrainingSequences(Store.open(store), 100_000, 0)


@pytest.mark.parametrize(
    ("precision", "backend", "size"),
    [
        ("bf16", "fsdp2", 1),
        pytest.param("bf16", "fsdp2", 2, marks=pytest.mark.slow),
        pytest.param("pure-bf16", "fsdp2", 1, marks=pytest.mark.slow),
        pytest.param("pure-bf16", "fsdp2", 2, marks=pytest.mark.slow),
        pytest.param("bf16", "zero1", 2, marks=pytest.mark.slow),
        pytest.param("bf16", "zero2", 2, marks=pytest.mark.slow),
        pytest.param("bf16", "zero3", 2, marks=pytest.mark.slow),
    ],
)
def test_in_bf16_it_learns_as_in_fp32(
    precision: str, backend: str, size: int, model: Path, store: Path, tmp_path: Path
) -> None:
    job = Job(model, store, tmp_path, {"precision": precision}, backend)
    losses, expected = run_ranks(train, size, job)[0], reference_losses(model, store)
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[step], rel=0.02), step
