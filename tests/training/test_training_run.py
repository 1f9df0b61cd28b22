"""The training stage in real processes: equal to a plain reference, exact on resume, the same rows at any world size."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from core.errors import Interrupted, UserError
from launcher.start import backend_environment
from tests.distributed import run_ranks
from tests.training.conftest import CONFIG, Recorder
from training.config import TrainingConfig
from training.optimizer import rate_factor
from training.packing import TrainingRows
from training.run import TrainingInputs, run
from training.store import Store


ROOT = Path(__file__).parents[2]


def train(
    changes: dict[str, Any], model: Path, store: Path, out: Path, stop_at: int = 0, backend: str = "fsdp2"
) -> dict[int, float]:
    """Train in this process (one of the ranks); losses by step. `stop_at`: rank 1 (or the only one) is signalled."""
    if int(os.environ["WORLD_SIZE"]) > 1 or backend != "fsdp2":
        os.environ.update(backend_environment(ROOT / "recipes" / "accelerate" / f"{backend}.yaml"))
    config = TrainingConfig(**{**CONFIG, **changes})
    tracker = Recorder()
    if stop_at and os.environ.get("RANK", "1") == "1":
        _signal_when(tracker, out, stop_at)
    try:
        run(config, TrainingInputs(model, model, store, "key"), out, tracker, None)
    except Interrupted:
        assert stop_at
    return {step: row["train/loss"] for step, row in tracker.rows if step and "train/loss" in row}


def _signal_when(tracker: Recorder, out: Path, step: int) -> None:
    log = tracker.log

    def log_and_signal(metrics: dict[str, float], step_now: int | None = None, **names: Any) -> None:
        log(metrics, names.get("step", step_now))
        if names.get("step", step_now) == step:
            os.kill(os.getpid(), signal.SIGUSR1)

    tracker.log = log_and_signal  # type: ignore[method-assign]


def reference_losses(model_path: Path, store: Path) -> dict[int, float]:
    """The same training in plain torch: one process, whole batches, logits all at once."""
    config = TrainingConfig(**CONFIG)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-4,
    )
    rows, losses = TrainingRows(Store.open(store), config.sequence_length, config.seed), {}
    for step in range(config.steps):
        batch = rows.batch(list(range(step * 8, step * 8 + 8)))
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * rate_factor(step, config.steps, config.schedule)
        optimizer.step()
        optimizer.zero_grad()
        losses[step + 1] = loss.item()
    return losses


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_a_plain_single_process_reference(
    size: int, tied: bool, model: Path, tied_model: Path, store: Path, tmp_path: Path
) -> None:
    chosen = tied_model if tied else model
    losses = run_ranks(train, size, {}, chosen, store, tmp_path)[0]
    expected = reference_losses(chosen, store)
    assert list(losses) == list(expected) == list(range(1, 13))
    assert losses[12] < losses[1] - 0.5
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[step], rel=2e-4), step


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "cpt" / "model.safetensors")


def test_stopped_by_a_signal_to_one_rank_and_resumed_it_is_bit_for_bit_the_same(
    model: Path, store: Path, tmp_path: Path
) -> None:
    whole = run_ranks(train, 2, {}, model, store, tmp_path / "whole")[0]
    first = run_ranks(train, 2, {}, model, store, tmp_path / "parts", 5)[0]
    assert max(first) in (5, 6)
    assert not (tmp_path / "parts" / "cpt").exists()
    second = run_ranks(train, 2, {}, model, store, tmp_path / "parts")[0]
    assert min(second) == max(first) + 1
    assert {**first, **second} == whole
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "parts")[name]), name


def test_a_checkpoint_of_two_processes_continues_on_one(model: Path, store: Path, tmp_path: Path) -> None:
    whole = run_ranks(train, 2, {}, model, store, tmp_path / "whole")[0]
    run_ranks(train, 2, {}, model, store, tmp_path / "parts", 5)
    second = run_ranks(train, 1, {}, model, store, tmp_path / "parts")[0]
    assert second
    for step, loss in second.items():
        assert loss == pytest.approx(whole[step], rel=1e-4)


def test_a_run_that_is_killed_continues_from_its_last_checkpoint(model: Path, store: Path, tmp_path: Path) -> None:
    whole = run_ranks(train, 1, {}, model, store, tmp_path / "whole")[0]
    with pytest.raises(AssertionError, match="killed"):
        run_ranks(train_and_die, 1, model, store, tmp_path / "parts")
    second = run_ranks(train, 1, {}, model, store, tmp_path / "parts")[0]
    assert min(second) in (5, 9)
    assert second == {step: loss for step, loss in whole.items() if step >= min(second)}


def train_and_die(model: Path, store: Path, out: Path) -> None:
    """Train until a checkpoint is there, then SIGKILL in the middle of what comes next."""

    def kill() -> None:
        while not list((out / "checkpoints").glob("step-*/train_state.json")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    train({}, model, store, out)


def test_a_checkpoint_of_another_configuration_is_refused(model: Path, store: Path, tmp_path: Path) -> None:
    run_ranks(train, 1, {"tokens": 32 * 8}, model, store, tmp_path)
    state = next((tmp_path / "checkpoints").glob("step-*/train_state.json"))
    state.write_text(state.read_text().replace('"key"', '"other"', 1).replace('"other": "key"', '"key": "other"'))
    with pytest.raises(AssertionError, match="is of another configuration"):
        run_ranks(train, 1, {"tokens": 32 * 8}, model, store, tmp_path)


def test_what_does_not_fit_is_one_sentence(model: Path, store: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="batch_rows = 7 does not divide over 2 processes"):
        run_ranks(train, 2, {"batch_rows": 7}, model, store, tmp_path)
    with pytest.raises(UserError, match="fewer than one row"):
        TrainingRows(Store.open(store), 100_000, 0)


@pytest.mark.parametrize("backend", ["zero1", "zero2", "zero3"])
def test_zero(backend: str, model: Path, store: Path, tmp_path: Path) -> None:
    losses = run_ranks(train, 2, {}, model, store, tmp_path, 0, backend)[0]
    expected = reference_losses(model, store)
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[step], rel=2e-4), step
