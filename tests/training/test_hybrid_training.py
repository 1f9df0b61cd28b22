"""Hybrid decoders train, resume and export: each document has the loss that transformers gives it alone."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from cpt_merge.core.errors import UserError
from cpt_merge.data.packing import IGNORED, TrainingSequences
from cpt_merge.data.store import Store
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.settings import BackendSettings
from cpt_merge.training.schedule import RateCurve
from cpt_merge.training.trainable import check_trainable
from tests.distributed import run_ranks
from tests.training.conftest import CONFIG
from tests.training.families import apart, make_family
from tests.training.runs import Job, assert_same_weights, train

STEPS = 6
CHANGES = {"sequence_length": 96, "tokens": 96 * 8 * STEPS, "checkpoints": {"every": 2}}


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A Mamba-2 hybrid with the tokenizer of `model`, in bfloat16 except what its family keeps."""
    folder = tmp_path_factory.mktemp("hybrid") / "granite-4"
    made = make_family(
        folder, "granite-4", tied=False, vocab_size=301, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    made.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, folder / name)
    return folder


def reference(folder: Path, store: Path) -> dict[int, float]:
    """Losses of plain transformers, one document after the other."""
    config = TrainingConfig(**{**CONFIG, **CHANGES})
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-4,
    )
    sequences = TrainingSequences(Store.open(store), config.sequence_length, config.seed)
    losses = {}
    for step in range(STEPS):
        batch = sequences.batch(range(step * 8, step * 8 + 8))
        targets, total = int((batch.labels != IGNORED).sum()), 0.0
        for part in apart(batch):
            logits = model(input_ids=part.input_ids, use_cache=False).logits[0]
            loss = torch.nn.functional.cross_entropy(
                logits, part.labels[0], ignore_index=IGNORED, reduction="sum"
            )
            (loss / targets).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * RateCurve.over(0, config.steps, config.schedule).factor(
                step, config.schedule
            )
        optimizer.step()
        optimizer.zero_grad()
        losses[step + 1] = total / targets
    return losses


@pytest.mark.parametrize(
    ("backend", "size"),
    [
        ("fsdp2", 1),
        ("fsdp2", 2),
        pytest.param("zero2", 2, marks=pytest.mark.slow),
    ],
)
def test_losses_are_those_of_transformers_document_by_document(
    backend: str, size: int, hybrid: Path, store: Path, tmp_path: Path
) -> None:
    if backend == "zero2":
        pytest.importorskip("deepspeed")
    job = Job(hybrid, store, tmp_path / "out", changes=CHANGES, backend=backend)
    found = run_ranks(train, size, job)[0]
    assert found == pytest.approx(reference(hybrid, store), abs=1e-5)
    with (
        safe_open(hybrid / "model.safetensors", "pt") as base,
        safe_open(tmp_path / "out" / "cpt" / "model.safetensors", "pt") as trained,
    ):
        assert set(trained.keys()) == set(base.keys())
        for name in base.keys():  # noqa: SIM118
            one, other = base.get_tensor(name), trained.get_tensor(name)
            assert (one.shape, one.dtype) == (other.shape, other.dtype), name
            assert not torch.equal(one, other), name


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    hybrid: Path, store: Path, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    losses = run_ranks(train, 2, Job(hybrid, store, whole, changes=CHANGES))[0]
    first = run_ranks(train, 2, Job(hybrid, store, stopped, changes=CHANGES, stop_after=3))[0]
    assert max(first) < STEPS
    then = run_ranks(train, 2, Job(hybrid, store, stopped, changes=CHANGES))[0]
    assert {**first, **then} == losses
    assert_same_weights(whole, stopped)


def start_block(job: Job) -> str:
    from cpt_merge.training import trainer

    said: list[str] = []
    trainer.say = said.append  # type: ignore[assignment]
    train(job)
    return " ".join(said[0].split())


def test_the_start_block_says_how_documents_are_kept_apart_and_what_it_costs(
    hybrid: Path, store: Path, tmp_path: Path
) -> None:
    changes = {**CHANGES, "tokens": 96 * 8, "activation_checkpointing": "selective"}
    job = Job(hybrid, store, tmp_path / "out", changes=changes)
    (said,) = run_ranks(start_block, 1, job)
    assert "documents one by one in GraniteMoeHybridMambaLayer, those of similar length" in said
    assert "padding is 15.6% of the positions computed there" in said


def test_zero_3_is_refused_before_the_first_stage(hybrid: Path) -> None:
    pytest.importorskip("deepspeed")
    with pytest.raises(UserError, match=r"which ZeRO 3 does not allow.*use FSDP2 or ZeRO 2"):
        check_trainable(
            hybrid, TrainingConfig(**CONFIG), BackendSettings("deepspeed", zero_stage=3),
            torch.device("cpu"),
        )  # fmt: skip
