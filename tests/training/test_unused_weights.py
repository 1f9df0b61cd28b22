"""Weights that take no part in the loss: AdamW makes no state for them, and checkpoints hold one."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed import run_ranks
from tests.training.conftest import CONFIG
from tests.training.families import make_family
from tests.training.runs import Job, assert_same_weights, train

CHANGES = {**CONFIG, "tokens": 32 * 8 * 4, "evaluate_every": 4, "checkpoints": {"every": 2}}


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_with_them_resumes_exactly(
    size: int, tmp_path: Path, model: Path, store: Path
) -> None:
    """Zamba2's layers hold adapters for every place, and use those of their own."""
    folder = tmp_path / "zamba2"
    make_family(folder, "zamba2", tied=False, vocab_size=301, max_position_embeddings=128)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, folder / name)
    whole = Job(folder, store, tmp_path / "whole", CHANGES)
    losses = run_ranks(train, size, whole)[0]
    first = run_ranks(train, size, Job(folder, store, tmp_path / "parts", CHANGES, stop_after=2))[0]
    rest = run_ranks(train, size, Job(folder, store, tmp_path / "parts", CHANGES))[0]
    assert {**first, **rest} == losses
    assert_same_weights(whole.out, tmp_path / "parts")
    before = load_file(folder / "model.safetensors")
    found = load_file(whole.out / "cpt" / "model.safetensors")
    kept = [name for name, values in before.items() if values.equal(found[name])]
    assert any("adapter" in name for name in kept)
    assert len(kept) < len(before) / 2
