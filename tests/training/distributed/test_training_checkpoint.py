"""Checkpoints are complete or absent, do not hold up training, and survive a kill at any moment."""

import contextlib
import json
import os
import random
import resource
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from cpt_merge.core.distributed import stop_process_group
from cpt_merge.core.errors import UserError
from cpt_merge.training.config import CheckpointConfig
from cpt_merge.training.distributed.checkpoint import (
    STATE_FILE,
    Checkpoints,
    TrainState,
    read_saved_state,
)
from cpt_merge.training.distributed.parallel import start_parallel
from tests.distributed import run_ranks
from tests.training.conftest import FinishedRun
from tests.training.runs import Job, ask_for, assert_same_weights, train


class SlowBackend:
    """Writes one file once it is allowed to."""

    layout = "slow"

    def __init__(self) -> None:
        self.value, self.allowed = torch.zeros(1), threading.Event()

    def save(self, directory: Path, asynchronous: bool) -> Future[None]:
        from concurrent.futures import ThreadPoolExecutor

        copy = self.value.clone()

        def write() -> None:
            assert self.allowed.wait(60)
            directory.mkdir(parents=True, exist_ok=True)
            torch.save(copy, directory / "value.pt")

        return ThreadPoolExecutor(1).submit(write)

    def writes_asynchronously(self, config: CheckpointConfig) -> bool:
        return config.asynchronous

    def load(self, directory: Path) -> None:
        self.value = torch.load(directory / "value.pt")

    def state_bytes(self) -> int:
        return 4

    def weights_are_finite(self) -> bool:
        return bool(self.value.isfinite().all())


def state(step: int, **changes: Any) -> TrainState:
    return TrainState("key", step, layout="slow", **changes)


def checkpoints_in(folder: Path, **settings: Any) -> Checkpoints:
    return Checkpoints(folder, CheckpointConfig(**settings), start_parallel())


def names(found: Checkpoints) -> list[int]:
    return [int(path.name[5:]) for path in found.complete()]


def write_during_training(folder: Path) -> tuple[list[int], list[int], float]:
    found, backend = checkpoints_in(folder, every=1), SlowBackend()
    found.start()
    backend.value += 1
    found.save(backend, state(1))  # type: ignore[arg-type]
    during = names(found)
    backend.value += 1  # the next step
    backend.allowed.set()
    found.finish()
    found.load(backend, state(1))  # type: ignore[arg-type]
    stop_process_group()
    return during, names(found), float(backend.value)


def test_a_save_does_not_block_and_holds_the_moment_of_the_call(tmp_path: Path) -> None:
    assert run_ranks(write_during_training, 1, tmp_path)[0] == ([], [1], 1)


def keeps(folder: Path) -> list[int]:
    found, backend = checkpoints_in(folder, every=2, keep=2, keep_every=4), SlowBackend()
    backend.allowed.set()
    found.start()
    for step in range(2, 15, 2):
        found.save(backend, state(step))  # type: ignore[arg-type]
    found.finish()
    stop_process_group()
    return names(found)


def test_the_newest_and_every_nth_are_kept(tmp_path: Path) -> None:
    assert run_ranks(keeps, 1, tmp_path)[0] == [4, 8, 12, 14]


def train_where_rank_1_cannot_write(job: Job) -> str:
    """After the first checkpoint, rank 1 cannot write files of more than 1,000 bytes."""
    if os.environ["RANK"] == "1":
        complete = Checkpoints.complete

        def limited(self: Checkpoints) -> list[Path]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            return complete(self)

        commit = Checkpoints._commit
        Checkpoints._commit = lambda self, *rest: (commit(self, *rest), limited(self))[0]  # type: ignore[method-assign]
    try:
        train(job)
    except UserError as error:
        return str(error)
    return ""


def test_what_fails_on_one_rank_is_told_on_all_and_the_one_before_stays(
    model: Path, store: Path, tmp_path: Path
) -> None:
    sentences = run_ranks(train_where_rank_1_cannot_write, 2, Job(model, store, tmp_path))
    for sentence in sentences:
        assert "a checkpoint could not be written" in sentence
        assert "step-00000004 is kept" in sentence
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("step-*[0-9]"))] == [
        "step-00000004"
    ]


class TogetherBackend(SlowBackend):
    """Writes in a collective, like DeepSpeed; rank 1 never enters it."""

    def writes_asynchronously(self, config: CheckpointConfig) -> bool:
        return False

    def save(self, directory: Path, asynchronous: bool) -> Future[None]:
        if os.environ["RANK"] == "1":
            raise OSError("no space left")
        dist.barrier()
        return Future()


def saves_together(folder: Path) -> tuple[str, float]:
    ask_for("zero2")
    found, began = checkpoints_in(folder), time.monotonic()
    found.start()
    try:
        found.save(TogetherBackend(), state(1))  # type: ignore[arg-type]
    except UserError as error:
        return str(error), time.monotonic() - began
    finally:
        stop_process_group()
    return "", 0.0


def test_a_rank_that_fails_within_a_collective_save_does_not_wait_for_the_others(
    tmp_path: Path,
) -> None:
    (_, first), (sentence, second) = run_ranks(saves_together, 2, tmp_path)
    assert "(no space left); no checkpoint is kept" in sentence
    assert max(first, second) < 30


def train_where_rank_1_cannot_copy(job: Job) -> str:
    """The second copy of rank 1's shards fails, as may happen with pinned memory."""
    from torch.distributed.checkpoint.staging import DefaultStager

    stage, calls = DefaultStager.stage, [0]

    def fails(self: DefaultStager, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2 and os.environ["RANK"] == "1":
            raise RuntimeError("out of pinned memory")
        return stage(self, *arguments)

    DefaultStager.stage = fails  # type: ignore[method-assign]
    try:
        train(job)
    except UserError as error:
        return str(error)
    return ""


def test_a_copy_that_fails_on_one_rank_ends_all(model: Path, store: Path, tmp_path: Path) -> None:
    sentences = run_ranks(train_where_rank_1_cannot_copy, 2, Job(model, store, tmp_path))
    for sentence, reason in zip(
        sentences, ("on another process", "out of pinned memory"), strict=True
    ):
        assert (
            f"could not be written to {tmp_path / 'checkpoints'} ({reason}); step-00000004 is kept"
            in sentence
        )


def test_a_full_disk_is_found_before_writing(model: Path, store: Path, tmp_path: Path) -> None:
    with pytest.raises(
        AssertionError, match=r"a checkpoint takes 0\.00 GB and .* has 0\.00 GB left; step-00000004"
    ):
        run_ranks(train_on_a_disk_that_fills, 2, Job(model, store, tmp_path))
    assert (tmp_path / "checkpoints" / "step-00000004" / STATE_FILE).is_file()


def train_on_a_disk_that_fills(job: Job) -> None:
    """The disk is full once there is a checkpoint."""
    real = shutil.disk_usage

    def usage(path: Any) -> Any:
        full = list(job.out.glob(f"checkpoints/step-*/{STATE_FILE}"))
        return real(path)._replace(free=10) if full else real(path)

    shutil.disk_usage = usage  # type: ignore[assignment]
    train(job)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_continues(
    model: Path, store: Path, finished: Callable[..., FinishedRun], tmp_path: Path
) -> None:
    job = Job(model, store, finished(stop_after=9).copied_to(tmp_path / "parts"))
    newest = sorted((job.out / "checkpoints").glob("step-*"))[-1]
    shard = next(newest.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(
        AssertionError, match=f"{newest.name} cannot be loaded .*remove it to continue"
    ):
        run_ranks(train, 1, job)
    shutil.rmtree(newest)
    rest = {step: loss for step, loss in finished().losses.items() if step > 8}
    assert run_ranks(train, 1, job)[0] == rest


def test_a_checkpoint_whose_numbers_were_changed_on_disk_is_found(
    model: Path, store: Path, finished: Callable[..., FinishedRun], tmp_path: Path
) -> None:
    job = Job(model, store, finished(stop_after=9).copied_to(tmp_path / "out"))
    newest = sorted((job.out / "checkpoints").glob("step-*"))[-1]
    reader = FileSystemReader(newest)
    embedding = {"model": {"model.model.embed_tokens.weight": torch.zeros(301, 32)}}
    load(embedding, storage_reader=reader)
    wanted = embedding["model"]["model.model.embed_tokens.weight"][7].numpy().tobytes()
    shard = next(path for path in newest.glob("*.distcp") if wanted in path.read_bytes())
    shard.write_bytes(shard.read_bytes().replace(wanted, b"\xff" * len(wanted), 1))
    with pytest.raises(AssertionError, match=f"{newest.name} is damaged .*remove it to continue"):
        run_ranks(train, 1, job)


@pytest.mark.parametrize("data", [b"\xff\x00", b"[]", b'{"step": 1}', b""])
def test_a_damaged_marker_is_named(data: bytes, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-00000004"
    checkpoint.mkdir()
    (checkpoint / STATE_FILE).write_bytes(data)
    with pytest.raises(UserError, match=rf"{STATE_FILE} cannot be read .*; remove .*00000004"):
        read_saved_state(checkpoint)


def test_a_checkpoint_without_its_marker_is_none(
    model: Path, store: Path, finished: Callable[..., FinishedRun], tmp_path: Path
) -> None:
    job = Job(model, store, finished(stop_after=9).copied_to(tmp_path / "out"))
    newest = sorted((job.out / "checkpoints").glob("step-*"))[-1]
    (newest / STATE_FILE).unlink()
    assert min(run_ranks(train, 1, job)[0]) == 9
    assert (
        json.loads((job.out / "checkpoints/step-00000012" / STATE_FILE).read_text())["step"] == 12
    )


@pytest.mark.slow
@pytest.mark.parametrize("turn", range(20))
def test_killed_at_random_moments_the_weights_are_those_of_the_undisturbed_run(
    turn: int, undisturbed: Path, model: Path, store: Path, tmp_path: Path
) -> None:
    """SIGKILL for one rank or all, during a save or a step; then the run continues to its end."""
    generator = random.Random(turn)
    job = Job(model, store, tmp_path, {"checkpoints": {"every": 2, "keep": 2}})
    for _ in range(3):
        job.kill_when = generator.choice(["step-*.tmp", f"step-*/{STATE_FILE}", "step-*.tmp/*"])
        job.kill_after_step = generator.randint(2, 10)
        job.killed = generator.choice([(0,), (1,), (0, 1)])
        job.kill_delay = generator.random() * 0.05
        with contextlib.suppress(AssertionError):  # the killed rank, or the one that lost it
            run_ranks(train, 2, job)
            break
    job.kill_when = ""
    run_ranks(train, 2, job)
    assert_same_weights(undisturbed, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


@pytest.fixture(scope="module")
def undisturbed(model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    run_ranks(train, 2, Job(model, store, out))
    return out
