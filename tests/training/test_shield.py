"""Source-shielded updates: what the source language needs stays as it was."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from cpt_merge.core.errors import UserError
from cpt_merge.data.packing import PackedDocuments
from cpt_merge.data.store import Store
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.build import check_backend
from cpt_merge.training.distributed.settings import BackendSettings
from tests.distributed import run_ranks
from tests.training.conftest import CONFIG
from tests.training.runs import Job, train

SHIELD: dict[str, Any] = {"shield": {"share": 0.5, "sequences": 6}, "tokens": 32 * 8 * 4}


def expected_columns(model_path: Path, store: Path) -> dict[str, torch.Tensor]:
    """The frozen columns by plain transformers, on the first six sequences of English."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    layers = {
        f"{name}.weight": part
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and name != "lm_head"
    }
    squares: dict[str, torch.Tensor] = {}

    def add(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor]) -> None:
            squares[name] = squares.get(name, 0) + inputs[0].square().sum((0, 1))  # type: ignore[operator]

        return hook

    for name, part in layers.items():
        part.register_forward_pre_hook(add(name))
    opened = Store.open(store)
    (english,) = [one for one in opened.info.sources if one.language == "en"]
    packed = PackedDocuments(opened.documents(english, "train"), 32)
    with torch.no_grad():
        for number in range(6):
            ids, _, positions = map(torch.from_numpy, packed.read(number))
            bounds = [*torch.nonzero(positions == 0).flatten().tolist(), 32]
            for begin, end in itertools.pairwise(bounds):
                model(ids[None, begin:end])
    found = {}
    for name, part in layers.items():
        scores = part.weight.detach().abs().mean(0) * squares[name].sqrt()
        found[name] = scores >= scores.sort(descending=True).values[len(scores) // 2 - 1]
    return found


def check_trained(model: Path, store: Path, out: Path) -> None:
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    expected = expected_columns(model, store)
    assert len(expected) == 14  # seven linear layers in each of two
    for name, frozen in expected.items():
        assert int(frozen.sum()) == len(frozen) // 2
        assert after[name][:, frozen].equal(before[name][:, frozen]), name
        assert (after[name][:, ~frozen] != before[name][:, ~frozen]).any(0).all(), name
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert not after[name].equal(before[name])


def test_columns_that_english_needs_stay_bit_for_bit(
    model: Path, store: Path, tmp_path: Path
) -> None:
    run_ranks(train, 1, Job(model, store, tmp_path / "out", SHIELD))
    check_trained(model, store, tmp_path / "out" / "cpt")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sharded_processes_freeze_the_same(
    model: Path, store: Path, tmp_path: Path, precision: str
) -> None:
    changes = {**SHIELD, "precision": precision}
    alone = run_ranks(train, 1, Job(model, store, tmp_path / "alone", changes))[0]
    job = Job(model, store, tmp_path / "divided", changes)
    assert run_ranks(train, 2, job)[0] == pytest.approx(
        alone, abs=2e-4 if precision == "fp32" else 0.02
    )
    if precision == "fp32":
        check_trained(model, store, tmp_path / "divided" / "cpt")


@pytest.mark.slow
def test_a_continued_run_keeps_its_columns(model: Path, store: Path, tmp_path: Path) -> None:
    whole = run_ranks(train, 2, Job(model, store, tmp_path / "whole", SHIELD))[0]
    first = run_ranks(train, 2, Job(model, store, tmp_path / "parts", SHIELD, stop_after=2))[0]
    rest = run_ranks(train, 2, Job(model, store, tmp_path / "parts", SHIELD))[0]
    assert first | rest == whole


@pytest.mark.parametrize(
    "other",
    [{"lora": {}}, {"optimizer": {"moments": "8bit"}}, {"precision": "pure-bf16"}],
)
def test_what_it_does_not_go_with_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`shield` trains the layers themselves"):
        TrainingConfig(**{**CONFIG, **SHIELD, **other})


def test_deepspeed_is_refused() -> None:
    asked = BackendSettings(backend="deepspeed", zero_stage=2)
    with pytest.raises(UserError, match=r"keeps as one flat vector; use FSDP2"):
        check_backend(asked, TrainingConfig(**{**CONFIG, **SHIELD}))
