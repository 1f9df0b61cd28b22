"""Training with adapters: the numbers of plain peft, any number of processes, and a merged export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cpt_merge.data.packing import TrainingSequences
from cpt_merge.data.store import Store
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.model.lora import Adapters
from cpt_merge.training.optimizer import rate_factor
from cpt_merge.training.saved import choose_steps, export_checkpoints
from tests.distributed import run_ranks
from tests.training.conftest import CONFIG
from tests.training.runs import Job, assert_same_weights, train_steps

LORA = {"lora": {"rank": 4}}


def reference_steps(model_path: Path, store: Path, lora: dict[str, Any]) -> dict[int, Any]:
    """The same in peft and torch, on one process with whole batches: loss and gradient norm."""
    from peft import LoraConfig, inject_adapter_in_model

    config = TrainingConfig(**CONFIG)
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    rank = lora["rank"]
    settings = LoraConfig(
        r=rank, lora_alpha=lora.get("alpha", 2 * rank), target_modules="all-linear"
    )
    inject_adapter_in_model(settings, model)
    for name, parameter in model.named_parameters():
        trained = "lora_" in name or name in ("model.embed_tokens.weight", "lm_head.weight")
        parameter.requires_grad_(trained)
        if ".lora_A." in name:
            parameter.data = Adapters().initial(name, parameter.shape)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.1)
    steps = {}
    rows = TrainingSequences(Store.open(store), config.sequence_length, config.seed)
    for step in range(config.steps):
        batch = rows.batch(list(range(step * 8, step * 8 + 8)))
        logits = model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * rate_factor(step, config.steps, config.schedule)
        optimizer.step()
        optimizer.zero_grad()
        steps[step + 1] = (loss.item(), norm.item())
    return steps


@pytest.mark.parametrize(("backend", "size"), [("fsdp2", 1), ("fsdp2", 2)])
def test_losses_are_those_of_plain_peft(
    backend: str, size: int, model: Path, store: Path, tmp_path: Path
) -> None:
    expected = reference_steps(model, store, LORA["lora"])
    found = run_ranks(train_steps, size, Job(model, store, tmp_path, LORA, backend))[0]
    for step, (loss, norm) in expected.items():
        assert found[step][0] == pytest.approx(loss, rel=1e-5)
        assert found[step][1] == pytest.approx(norm, rel=1e-4)


ONE = ("fsdp2", 1)
GROUPS = [
    ("fsdp2", 2),
    *(
        pytest.param(*one, marks=pytest.mark.slow)
        for one in [
            ("fsdp2", 3),
            ("hsdp", 4),
            ("zero1", 2),
            ("zero2", 2),
            ("zero3", 2),
            ("zero3", 3),
        ]
    ),
]
UNEVEN = {"lora": {"rank": 5}, "global_batch_size": 12, "tokens": 32 * 12 * 8}


@pytest.mark.parametrize(("backend", "size"), GROUPS)
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_any_number_of_processes_trains_the_same_and_resumes_exactly(
    backend: str, size: int, precision: str, model: Path, store: Path, tmp_path: Path
) -> None:
    changes = {**UNEVEN, "precision": precision}
    alone = run_ranks(train_steps, 1, Job(model, store, tmp_path / "one", changes))[0]
    job = Job(model, store, tmp_path / "whole", changes, backend)
    together = run_ranks(train_steps, size, job)[0]
    for step, (loss, _) in alone.items():
        assert together[step][0] == pytest.approx(loss, rel=2e-4 if precision == "fp32" else 1e-2)
    job.out, job.stop_after = tmp_path / "parts", 5
    first = run_ranks(train_steps, size, job)[0]
    job.stop_after = 0
    second = run_ranks(train_steps, size, job)[0]
    assert {**first, **second} == together
    assert len(second) < len(together)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    config = job.config
    checkpoints = choose_steps(job.out / "checkpoints", None, None)
    export_checkpoints(config, model, model, checkpoints, tmp_path / "cpt")
    assert_same_weights(tmp_path / "whole", tmp_path)
