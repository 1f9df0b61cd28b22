"""What a phase does not train stays equal bit for bit, and a run through phases resumes exactly."""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cpt_merge.checkpoint.vocabulary_map import NewPiece, VocabularyMap
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.phases import phases_of
from tests.distributed import run_ranks
from tests.training.runs import Job, assert_same_weights, train, weights

ROW = 32 * 8
PHASES = [
    {"train": "new_rows", "tokens": 4 * ROW},
    {"train": "vocabulary", "tokens": 4 * ROW},
    {"train": "all"},
]
OLD_ROWS = 200
MATRICES = {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.fixture
def tokenizer(model: Path, tmp_path: Path) -> Path:
    return extended_tokenizer(model, tmp_path)


def extended_tokenizer(model: Path, out: Path) -> Path:
    """The model's tokenizer, as if its pieces from OLD_ROWS on were an extension."""
    folder = out / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    new = [NewPiece(row, f"piece {row}", [0]) for row in range(OLD_ROWS, 301)]
    VocabularyMap(OLD_ROWS, 301, new, [], []).save(folder)
    return folder


def test_budgets_become_whole_steps_that_follow_each_other() -> None:
    config = TrainingConfig(tokens=1000, sequence_length=10, global_batch_size=5, phases=[
        {"train": "new_rows", "tokens": 120, "learning_rate": 0.5}, {"train": "all"}])  # fmt: skip
    first, second = phases_of(config)
    assert (first.start, first.stop, second.start, second.stop) == (0, 3, 3, 20)
    assert (first.learning_rate, first.embedding_learning_rate) == (0.5, 0.5)
    assert second.learning_rate == config.optimizer.learning_rate


@pytest.mark.parametrize(
    ("phases", "sentence"),
    [
        ([{"train": "new_rows"}, {"train": "all"}], "only the last"),
        ([{"train": "new_rows", "tokens": 2000}, {"train": "all"}], "raise it"),
        ([{"train": "vocabulary", "tokens": 400}], "it takes the rest"),
    ],
)
def test_budgets_that_contradict_are_refused(
    phases: list[dict[str, object]], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        TrainingConfig(tokens=1000, sequence_length=10, global_batch_size=5, phases=phases)


def phase_model(out: Path, number: int) -> dict[str, torch.Tensor]:
    return load_file(out / f"phase-{number}" / "model.safetensors")


def keep_phases() -> None:
    from cpt_merge.training.trainer import Trainer

    Trainer.remove_phases = lambda self: None  # type: ignore[method-assign]


def train_and_keep(job: Job) -> dict[int, float]:
    keep_phases()
    return train(job)


@pytest.mark.parametrize(
    "tied", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["untied", "tied"]
)
@pytest.mark.parametrize(
    ("backend", "size"),
    [("fsdp2", 2), *(pytest.param(f"zero{stage}", 2, marks=pytest.mark.slow) for stage in (1, 2, 3)),
     pytest.param("hsdp", 4, marks=pytest.mark.slow)],
)  # fmt: skip
def test_what_a_phase_does_not_train_does_not_move_by_one_bit(
    backend: str,
    size: int,
    tied: bool,
    model: Path,
    tied_model: Path,
    store: Path,
    tokenizer: Path,
    tmp_path: Path,
) -> None:
    chosen, out = tied_model if tied else model, tmp_path / "run"
    job = Job(chosen, store, out, {"phases": PHASES}, backend, tokenizer=tokenizer)
    losses = run_ranks(train_and_keep, size, job)[0]
    assert sorted(losses) == list(range(1, 13))
    start = load_file(chosen / "model.safetensors")
    first, second, last = phase_model(out, 1), phase_model(out, 2), weights(out)
    for name, before in start.items():
        if name not in MATRICES:
            assert torch.equal(first[name], before), name
            assert torch.equal(second[name], before), name
            assert not torch.equal(last[name], before), name
            continue
        assert torch.equal(first[name][:OLD_ROWS], before[:OLD_ROWS]), name
        moved = (first[name][OLD_ROWS:] != before[OLD_ROWS:]).any(dim=1)
        assert moved.any(), name
        assert not torch.equal(second[name][:OLD_ROWS], before[:OLD_ROWS]), name


STILL = 1e-30  # a learning rate that changes no weight
STILL_PHASES = [
    {"train": "vocabulary", "tokens": 2 * ROW},
    {"train": "all", "tokens": 2 * ROW, "learning_rate": STILL},
    {"train": "vocabulary", "learning_rate": STILL},
]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("backend", ["fsdp2", "zero1", "zero2", "zero3", "zero3-offload"])
def test_bf16_loses_no_digit_of_what_it_loads(
    backend: str, tied: bool, model: Path, tied_model: Path, store: Path, tmp_path: Path
) -> None:
    """Neither those of an fp32 base nor those between phases, nor in a checkpoint."""
    chosen, out = tied_model if tied else model, tmp_path / "run"
    changes = {"phases": STILL_PHASES, "precision": "bf16", "tokens": 8 * ROW}
    job = Job(chosen, store, out, changes, backend, stop_after=6)
    run_ranks(train_and_keep, 2, job)
    job.stop_after = 0
    run_ranks(train_and_keep, 4, job)
    start, trained = load_file(chosen / "model.safetensors"), phase_model(out, 1)
    for name, before in start.items():
        assert torch.equal(trained[name], before) == (name not in MATRICES), name
        assert not torch.equal(before, before.bfloat16().float()) or before.ndim == 1, name
    for later in (phase_model(out, 2), weights(out)):
        for name, values in trained.items():
            assert torch.equal(later[name], values), name


@pytest.mark.parametrize(
    "stop_after", [6, *(pytest.param(step, marks=pytest.mark.slow) for step in (2, 4, 10))]
)
def test_a_run_through_phases_resumes_exactly(
    stop_after: int, model: Path, store: Path, tokenizer: Path, tmp_path: Path
) -> None:
    job = Job(model, store, tmp_path / "whole", {"phases": PHASES}, tokenizer=tokenizer)
    whole = run_ranks(train, 1, job)[0]
    job.out, job.stop_after = tmp_path / "parts", stop_after
    first = run_ranks(train, 1, job)[0]
    job.stop_after = 0
    second = run_ranks(train, 1, job)[0]
    assert {**first, **second} == whole
    assert set(first).isdisjoint(second)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    assert not list(tmp_path.glob("*/phase-*")), "weights between phases are removed at the end"


def train_and_stop_between_phases(job: Job) -> dict[int, float]:
    """The signal comes when the first phase is exported and the second has no checkpoint yet."""
    from cpt_merge.training.distributed.fsdp import TorchBackend

    close = TorchBackend.close
    TorchBackend.close = lambda self: (close(self), os.kill(os.getpid(), signal.SIGUSR1))[0]  # type: ignore[method-assign]
    return train(job)


@pytest.mark.slow
def test_stopped_between_two_phases_the_second_one_begins_with_the_export(
    model: Path, store: Path, tokenizer: Path, tmp_path: Path
) -> None:
    job = Job(model, store, tmp_path / "whole", {"phases": PHASES}, tokenizer=tokenizer)
    whole = run_ranks(train, 1, job)[0]
    job.out, job.stop_after = tmp_path / "parts", 10**9
    first = run_ranks(train_and_stop_between_phases, 1, job)[0]
    assert max(first) == 4
    second = run_ranks(train, 1, job)[0]
    assert {**first, **second} == whole
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["fsdp2", *(pytest.param(f"zero{n}", marks=pytest.mark.slow) for n in (1, 2, 3))]
)
def test_a_run_that_was_killed_when_all_was_done_exports_again(
    backend: str, model: Path, store: Path, tmp_path: Path
) -> None:
    """The weights between phases are gone by then; frozen weights come from the checkpoint."""
    phases = [{"train": "all", "tokens": 8 * ROW}, {"train": "vocabulary"}]
    job = Job(model, store, tmp_path, {"phases": phases}, backend)
    run_ranks(train, 2, job)
    before = weights(tmp_path)
    assert run_ranks(train, 2, job)[0] == {}
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(tmp_path).items())


def test_new_rows_need_to_be_known(model: Path, store: Path, tmp_path: Path) -> None:
    with pytest.raises(
        AssertionError, match=r"has no vocabulary_map\.json, so nothing tells which rows are new"
    ):
        run_ranks(train, 1, Job(model, store, tmp_path, {"phases": PHASES}))
