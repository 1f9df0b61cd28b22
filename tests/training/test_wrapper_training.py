"""Wrappers: only the text decoder is in training, and towers come out as they went in."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from cpt_merge.data.packing import IGNORED, Batch, TrainingSequences
from cpt_merge.data.store import Store
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.settings import BackendSettings
from cpt_merge.training.model.build import build_model, load_weights
from cpt_merge.training.schedule import RateCurve
from cpt_merge.training.trainable import check_trainable
from tests.distributed import run_ranks
from tests.training.conftest import CONFIG
from tests.training.families import apart, documents
from tests.training.runs import Job, train, weights
from tests.wrappers import WRAPPERS, make_wrapper

CPU = torch.device("cpu")
SHORT = {**CONFIG, "tokens": 32 * 8 * 6}
OWN_ATTENTION = {"llama4": "sdpa"}  # families that flash does not fit
TOWERS = ("vision", "visual", "audio", "projector", "connector")


def plain_loss(model: Any, batch: Batch) -> torch.Tensor:
    """The sum of the losses that transformers' wrapper gives, each document on its own."""
    total = torch.zeros(())
    for part in apart(batch):
        if (part.labels != IGNORED).any():
            logits = model(input_ids=part.input_ids, use_cache=False).logits[0].float()
            labels = part.labels[0]
            total = total + F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total


def is_tower(name: str) -> bool:
    return any(part in name for part in TOWERS)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", WRAPPERS)
def test_the_loss_is_the_wrapper_s_and_no_tower_is_in_memory(
    family: str, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, batch = make_wrapper(tmp_path, family, tied), documents(2)
    attention = OWN_ATTENTION.get(family, "flash")
    config = TrainingConfig(**{**CONFIG, "attention": attention})
    check_trainable(tmp_path, config, BackendSettings(), CPU)
    module = build_model(tmp_path, config)
    capsys.readouterr()
    load_weights(module, tmp_path, CPU)
    loss = module(batch)
    assert loss.item() == pytest.approx(plain_loss(reference, batch).item(), rel=1e-6)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    stored = load_file(tmp_path / "model.safetensors")
    towers = {name for name in stored if is_tower(name)}
    assert towers
    assert module.stored.used == stored.keys() - towers
    assert f"{len(towers)} tensors of {tmp_path} are not loaded" in capsys.readouterr().err


def prepare(folder: Path, family: str, tokenizer: Path) -> Path:
    """A wrapper of the family in bfloat16, with a tokenizer."""
    make_wrapper(folder, family).to(torch.bfloat16).save_pretrained(folder)
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def plain_losses(directory: Path, store: Path) -> dict[int, float]:
    """The losses of a training of the whole wrapper in plain torch, towers frozen."""
    config = TrainingConfig(**SHORT)
    name = json.loads((directory / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(directory, dtype=torch.float32)
    trained = [p for n, p in model.named_parameters() if not is_tower(n)]
    decay = [{"params": [p for p in trained if (p.ndim > 1) == many], "weight_decay": rate}
             for many, rate in ((True, 0.1), (False, 0.0))]  # fmt: skip
    optimizer = torch.optim.AdamW(decay, betas=(0.9, 0.95), eps=1e-4)
    sequences = TrainingSequences(Store.open(store), config.sequence_length, config.seed)
    losses = {}
    for step in range(config.steps):
        batch = sequences.batch(list(range(step * 8, step * 8 + 8)))
        loss = plain_loss(model, batch) / (batch.labels != IGNORED).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * RateCurve.over(0, config.steps, config.schedule).factor(
                step, config.schedule
            )
        optimizer.step()
        optimizer.zero_grad()
        losses[step + 1] = loss.item()
    return losses


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "backend", "ranks"),
    [
        pytest.param("mistral3", "fsdp2", 1, marks=slow),  # one process is not sharded
        *(pytest.param(family, backend, ranks, marks=slow) for family, backend, ranks in (
            ("gemma3", "fsdp2", 2), ("gemma3", "zero3", 2), ("qwen2.5-vl", "zero3", 2), ("qwen2.5-vl", "fsdp2", 2), ("mistral3", "zero3", 2),
            ("qwen3-vl", "fsdp2", 2), ("voxtral", "fsdp2", 2), ("llava", "zero3", 2), ("llama4", "fsdp2", 2),
        )),
    ],
)  # fmt: skip
def test_training_resumes_exactly_and_exports_the_base_s_layout(
    family: str, backend: str, ranks: int, tmp_path: Path, model: Path, store: Path
) -> None:
    base = prepare(tmp_path / "base", family, model)
    changes = {**SHORT, "attention": OWN_ATTENTION.get(family, "flash")}
    whole = Job(base, store, tmp_path / "whole", changes, backend)
    losses = run_ranks(train, ranks, whole)[0]
    assert losses == pytest.approx(plain_losses(base, store), abs=2e-5)

    out = tmp_path / "parts"
    first = run_ranks(train, ranks, Job(base, store, out, changes, backend, stop_after=3))[0]
    rest = run_ranks(train, ranks, Job(base, store, out, changes, backend))[0]
    assert {**first, **rest} == losses
    before, found, again = (load_file(base / "model.safetensors"), weights(whole.out), weights(out))
    assert found.keys() == before.keys()
    for name, values in before.items():
        assert (found[name].shape, found[name].dtype) == (values.shape, values.dtype), name
        assert torch.equal(found[name], again[name]), name
        assert torch.equal(found[name], values) == is_tower(name), name
    config = json.loads((base / "config.json").read_text())
    assert json.loads((out / "cpt" / "config.json").read_text()) == config
