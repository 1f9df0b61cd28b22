"""Training on pairs of a preferred and a rejected reply (DPO)."""

import itertools
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from cpt_merge.core.artifact import fingerprint, write_json
from cpt_merge.data.conversations_rows import ChatRow
from cpt_merge.data.conversations_store import Group, write_groups
from cpt_merge.data.encoding import DocumentEncoder
from cpt_merge.data.packing import IGNORED, TrainingSequences
from cpt_merge.data.pairs import Reference
from cpt_merge.data.store import STORE_FILE, SourceInfo, Store, StoreInfo
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.schedule import RateCurve
from tests.distributed import run_ranks
from tests.training.conftest import CONFIG
from tests.training.runs import Job, train, train_rows

BETA, LENGTH = 0.5, 32
SHORT: dict[str, Any] = {
    "tokens": LENGTH * 4 * 6, "global_batch_size": 4, "evaluate_every": 3,
    "checkpoints": {"every": 2},
}  # fmt: skip


def rows(generator: np.random.Generator) -> list[ChatRow]:
    """A pair: the same prompt, and two replies of other lengths and other tokens."""
    prompt = generator.integers(2, 300, generator.integers(2, 6)).tolist()
    replies = [
        generator.integers(first, first + 20, generator.integers(2, 9)).tolist()
        for first in (100, 200)
    ]
    return [
        ChatRow([*prompt, *reply], [False] * len(prompt) + [True] * len(reply), 1)
        for reply in replies
    ]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder, generator = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    info = DocumentEncoder.read(model).info
    counts = {
        split: write_groups(
            (Group.of(rows(generator), info.dtype) for _ in range(number)),
            folder / "00-ko" / split, info.dtype, LENGTH, 1,
        )
        for split, number in (("train", 40), ("heldout", 9))
    }  # fmt: skip
    source = SourceInfo("ko:pairs", "ko", "00-ko", {}, **counts, reference=None)
    write_json(folder / STORE_FILE, asdict(StoreInfo("digest", info, None, [source])))
    return folder


def plain_losses(model_path: Path, store: Path) -> list[float]:
    """The same run on whole logits, document by document, with the formula of the paper."""
    config = TrainingConfig(**{**CONFIG, **SHORT})
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    frozen = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95), eps=1e-4,
    )  # fmt: skip
    sequences = TrainingSequences(Store.open(store), LENGTH, config.seed)
    curve, losses = RateCurve.over(0, config.steps, config.schedule), []
    for step in range(config.steps):
        batch = sequences.batch(range(step * 4, step * 4 + 4))
        bounds = batch.cu_seqlens.tolist()
        ids, labels = batch.input_ids.flatten(), batch.labels.flatten()
        gained = []
        for begin, end in itertools.pairwise(bounds):
            targets = labels[begin:end]
            if (targets == IGNORED).all():
                continue
            now, then = (
                -F.cross_entropy(
                    one(ids[None, begin:end]).logits[0], targets, ignore_index=IGNORED,
                    reduction="sum",
                )
                for one in (model, frozen)
            )  # fmt: skip
            gained.append(now - then.detach())
        difference = torch.stack(gained).view(-1, 2)
        loss = -F.logsigmoid(BETA * (difference[:, 0] - difference[:, 1])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * curve.factor(step, config.schedule)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_losses_are_those_of_the_formula(model: Path, pairs: Path, tmp_path: Path) -> None:
    job = Job(model, pairs, tmp_path / "out", SHORT, beta=BETA)
    found = run_ranks(train_rows, 1, job)[0]
    losses = [row["train/loss"] for row in found.values()]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses == pytest.approx(plain_losses(model, pairs), abs=2e-5)
    assert found[1]["train/preferred"] == 0.0  # the reference itself prefers nothing
    assert found[6]["train/preferred"] > 0.5
    assert found[6]["train/margin"] > 0.0


def test_a_split_without_pairs_has_an_empty_reference(tmp_path: Path) -> None:
    """A source may have nothing held out, if another one has."""
    Reference.of([]).write(tmp_path / "reference.npz")
    kept = Reference.read(tmp_path / "reference.npz")
    assert kept.values.shape == (0, 2)
    assert kept.pairs(np.zeros(0, np.int64)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp2", "zero2", "zero3"])
def test_every_backend_compares_the_same(
    model: Path, pairs: Path, tmp_path: Path, backend: str
) -> None:
    alone = run_ranks(train, 1, Job(model, pairs, tmp_path / "alone", SHORT, beta=BETA))[0]
    job = Job(model, pairs, tmp_path / "divided", SHORT, backend, beta=BETA)
    assert run_ranks(train, 2, job)[0] == pytest.approx(alone, abs=2e-4)


@pytest.mark.slow
def test_an_interrupted_comparison_continues_exactly(
    model: Path, pairs: Path, tmp_path: Path
) -> None:
    """The reference is that of the start, and not of the checkpoint."""
    whole = Job(model, pairs, tmp_path / "whole", SHORT, beta=BETA)
    expected = run_ranks(train, 2, whole)[0]
    parts = replace(whole, out=tmp_path / "parts", stop_after=3)
    first = run_ranks(train, 2, parts)[0]
    rest = run_ranks(train, 2, replace(parts, stop_after=0))[0]
    assert first | rest == expected
    for path in (whole.out / "cpt").glob("*.safetensors"):
        assert fingerprint(parts.out / "cpt" / path.name) == fingerprint(path)
