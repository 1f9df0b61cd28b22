"""Offloaded activations leave the device, come back, and change no number."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cpt_merge.core.errors import UserError
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.model.activations import Moved, OffloadedActivations
from cpt_merge.training.model.build import CausalLM, build_model, load_weights, prepare_layers
from tests.distributed import run_ranks
from tests.training.conftest import CONFIG
from tests.training.families import documents, make_family
from tests.training.runs import Job, assert_same_weights, train_steps

CPU = torch.device("cpu")


def loaded(folder: Path, **changes: Any) -> CausalLM:
    config = TrainingConfig(**CONFIG | changes)
    module = build_model(folder, config)
    prepare_layers(module, config, CPU)
    load_weights(module, folder, CPU)
    return module


def gradients(module: CausalLM) -> list[Tensor]:
    """The loss and all gradients."""
    loss = module(documents(3))
    loss.backward()
    return [loss.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("attention", ["flash", "sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3-moe"])
def test_gradients_are_the_same_bit_for_bit(
    family: str, attention: str, recompute: str, tmp_path: Path
) -> None:
    make_family(tmp_path, family, tied=False)
    changes = {"attention": attention, "activation_checkpointing": recompute}
    expected = gradients(loaded(tmp_path, **changes))
    found = gradients(loaded(tmp_path, offload_activations=True, **changes))
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_what_is_moved_is_freed_and_weights_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_family(tmp_path, "llama", tied=False)
    module, given, copies = loaded(tmp_path, offload_activations=True), list[Any](), list[Any]()
    pack = OffloadedActivations._pack

    def watched(self: OffloadedActivations, tensor: Tensor) -> Tensor | Moved:
        packed = pack(self, tensor)
        if isinstance(packed, Moved):
            given.append(weakref.ref(tensor.untyped_storage()))
            copies.append(weakref.ref(packed.values))
        return packed

    monkeypatch.setattr(OffloadedActivations, "_pack", watched)
    loss = module(documents(3))
    gc.collect()
    assert len(given) > 20
    assert all(storage() is None for storage in given), "weights would still be held"
    assert all(copy() is not None for copy in copies)
    del loss
    assert all(copy() is None for copy in copies), "without a backward pass, too"


def test_layers_whose_inputs_are_not_seen_are_refused(tmp_path: Path) -> None:
    make_family(tmp_path, "llama", tied=False)
    module = loaded(tmp_path, offload_activations=True)
    module.activations = OffloadedActivations(layers=1000)
    with pytest.raises(UserError, match=r"of 1000 layers only \d+ tensors could be moved"):
        module(documents(1))
    with torch.no_grad():
        module(documents(1))


def test_selective_checkpointing_would_move_the_least() -> None:
    with pytest.raises(ValueError, match="moves only the layers' inputs with activation_check"):
        TrainingConfig(**CONFIG, offload_activations=True, activation_checkpointing="selective")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "size", "changes"),
    [
        ("fsdp2", 1, {"precision": "bf16"}),
        ("fsdp2", 2, {}),
        ("fsdp2-offload", 3, {"activation_checkpointing": "full", "global_batch_size": 6}),
        ("fsdp2", 2, {"phases": [{"train": "vocabulary", "tokens": 6 * 32 * 8}, {"train": "all"}]}),
        ("fsdp2", 2, {"compile": True, "activation_checkpointing": "full"}),
        ("fsdp2", 1, {"compile": True}),
        ("zero2", 2, {}),
        ("zero3", 2, {"activation_checkpointing": "full"}),
        ("zero3", 2, {}),
    ],
)
def test_whole_runs_are_the_same_bit_for_bit(
    backend: str, size: int, changes: dict[str, Any], model: Path, store: Path, tmp_path: Path
) -> None:
    plain = Job(model, store, tmp_path / "plain", changes, backend)
    moved = Job(model, store, tmp_path / "moved", changes | {"offload_activations": True}, backend)
    assert (
        run_ranks(train_steps, size, plain, timeout=400)[0]
        == (run_ranks(train_steps, size, moved, timeout=400)[0])
    )
    assert_same_weights(plain.out, moved.out)
