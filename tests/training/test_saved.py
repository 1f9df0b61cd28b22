"""Any training checkpoint becomes the model that the run itself would have exported there."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cpt_merge.core.errors import UserError
from cpt_merge.training.callbacks.checkpoint import CheckpointSaving
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.saved import choose_steps, export_checkpoints, open_checkpoint
from tests.distributed import run_ranks
from tests.training.conftest import CONFIG, FinishedRun
from tests.training.runs import Job, train

Finished = Callable[..., FinishedRun]
BACKENDS = [
    ("fsdp2", 1),
    ("fsdp2", 2),
    pytest.param("zero2", 2, marks=pytest.mark.slow),
    pytest.param("hsdp", 4, marks=pytest.mark.slow),
    pytest.param("zero1", 2, marks=pytest.mark.slow),
    pytest.param("zero3", 2, marks=pytest.mark.slow),
]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: w for file in directory.glob("*.safetensors") for name, w in load_file(file).items()
    }


def export(run: FinishedRun, like: Path, out: Path, average: str | None = None) -> None:
    checkpoints = choose_steps(run.out / "checkpoints", None, average)
    export_checkpoints(TrainingConfig(**CONFIG), like, like, checkpoints, out)


@pytest.mark.parametrize(("backend", "size"), BACKENDS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_last_checkpoint_is_the_model_that_the_run_exported(
    finished: Finished, model: Path, tied_model: Path, tmp_path: Path, backend, size, tied
) -> None:
    run = finished(backend, size, tied)
    export(run, tied_model if tied else model, tmp_path / "out")
    ours, theirs = weights(tmp_path / "out"), weights(run.out / "cpt")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def train_and_export(job: Job) -> None:
    """Train; at each checkpoint the run exports the model as it does in the end."""
    save = CheckpointSaving._save

    def save_and_export(self: CheckpointSaving) -> None:
        trainer: Any = self.trainer
        before = trainer.checkpoints._saved
        save(self)
        if trainer.checkpoints._saved != before:
            trainer.export(trainer.shards(), job.out / f"own-{trainer.state.step}")

    CheckpointSaving._save = save_and_export  # type: ignore[method-assign]
    train(job)


PHASES = [{"train": "vocabulary", "tokens": 2 * 32 * 12}, {"train": "all"}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "precision"),
    [
        ("fsdp2", "pure-bf16"),
        *itertools.product(("fsdp2", "zero1", "zero2", "zero3"), ("fp32", "bf16")),
    ],
)
@pytest.mark.parametrize("lora", [None, {"rank": 5}], ids=["full", "lora"])
def test_each_checkpoint_of_a_stopped_run_is_the_model_that_the_run_had(
    backend: str, precision: str, lora: Any, model: Path, store: Path, tmp_path: Path
) -> None:
    """In a phase with frozen weights, and in the one after it."""
    changes = {
        "precision": precision, "lora": lora, "phases": PHASES, "tokens": 8 * 32 * 12,
        "global_batch_size": 12, "checkpoints": {"every": 1, "keep": 9},
    }  # fmt: skip
    job = Job(model, store, tmp_path, changes, backend, stop_after=3)
    run_ranks(train_and_export, 3, job)
    checkpoints = choose_steps(tmp_path / "checkpoints", None, "1..9")
    assert len(checkpoints) >= 3
    for checkpoint in checkpoints:
        step = int(checkpoint.name[5:])
        export_checkpoints(job.config, model, model, [checkpoint], tmp_path / f"file-{step}")
        found, own = (weights(tmp_path / f"{kind}-{step}") for kind in ("file", "own"))
        assert found.keys() == own.keys()
        assert all(torch.equal(found[name], values) for name, values in own.items())


@pytest.mark.parametrize(("backend", "size"), [("fsdp2", 2), ("zero2", 2)])
def test_an_average_is_the_mean_of_the_checkpoints_and_rounded_once(
    finished: Finished, model: Path, tmp_path: Path, backend: str, size: int
) -> None:
    run = finished(backend, size)
    every = choose_steps(run.out / "checkpoints", None, "0..1000000")
    export(run, model, tmp_path / "out", average="0..1000000")
    readers = [open_checkpoint(path) for path in every]
    for name, stored in weights(tmp_path / "out").items():
        parts = [read(f"model.{name}").double() for read in readers]
        assert len({float(part.sum()) for part in parts}) > 1, "the checkpoints differ"
        mean = (sum(parts) / len(parts)).float()
        torch.testing.assert_close(stored, mean.to(stored.dtype), rtol=1e-6, atol=0)


def test_steps_that_are_not_there_are_named_with_those_that_are(
    finished: Finished, tmp_path: Path
) -> None:
    directory = finished().out / "checkpoints"
    kept = sorted(int(path.name[5:]) for path in directory.glob("step-*"))
    for step, average in ((3, None), (None, "1..2"), (None, "4"), (4, "1..8")):
        with pytest.raises(UserError, match=r"(there are|which are of the steps) |takes two steps"):
            choose_steps(directory, step, average)
    assert choose_steps(directory, kept[0], None) == [directory / f"step-{kept[0]:08d}"]
    with pytest.raises(UserError, match="no complete checkpoint"):
        choose_steps(tmp_path, None, None)


@pytest.mark.parametrize(("backend", "size"), [("fsdp2", 2), ("zero2", 2)])
def test_a_damaged_checkpoint_is_named(
    finished: Finished, model: Path, tmp_path: Path, backend: str, size: int
) -> None:
    out = finished(backend, size).copied_to(tmp_path / "run")
    newest = choose_steps(out / "checkpoints", None, None)[0]
    for path in newest.rglob("*"):
        if path.suffix in (".pt", ".distcp"):
            path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=re.escape(f"{newest} cannot be read")):
        export_checkpoints(TrainingConfig(**CONFIG), model, model, [newest], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_model_is_refused(
    finished: Finished, model: Path, tmp_path: Path
) -> None:
    larger = tmp_path / "larger"
    shutil.copytree(model, larger)
    config = json.loads((larger / "config.json").read_text())
    (larger / "config.json").write_text(
        json.dumps(config | {"vocab_size": config["vocab_size"] + 8})
    )
    with pytest.raises(UserError, match="they belong to different runs"):
        export(finished(), larger, tmp_path / "out")
    assert not (tmp_path / "out").exists()
