"""Activation checkpointing keeps less, computes more, and changes no number; also compiled and sharded."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.model.build import (
    CausalLM,
    build_model,
    load_weights,
)
from cpt_merge.training.model.recompute import Recompute, apply_recompute
from tests.distributed import run_ranks
from tests.training.conftest import CONFIG
from tests.training.families import documents, make_family

MODES: tuple[Recompute, ...] = ("none", "selective", "full")


def loaded(folder: Path, mode: Recompute, attention: str = "flash") -> CausalLM:
    module = build_model(folder, TrainingConfig(**{**CONFIG, "attention": attention}))
    load_weights(module, folder, torch.device("cpu"))
    apply_recompute(module.layers, mode)
    return module


class Watch(TorchDispatchMode):
    """Counts matmuls, and sees which results are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.matmuls = 0
        self.results = list[Any]()

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), names: Any = None
    ) -> Any:
        result = operation(*arguments, **(names or {}))
        self.matmuls += operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        self.results += [
            weakref.ref(r.untyped_storage()) for r in [result] if isinstance(r, torch.Tensor)
        ]
        return result

    def held(self) -> int:
        gc.collect()
        storages = {
            s.data_ptr(): s.nbytes() for s in (result() for result in self.results) if s is not None
        }
        return sum(storages.values())


@pytest.mark.parametrize("attention", ["flash", "sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_less_is_kept_and_more_computed_with_the_same_result(
    attention: str, family: str, tmp_path: Path
) -> None:
    make_family(tmp_path, family, tied=False)
    held, matmuls, gradients = [], [], []
    for mode in MODES:
        module = loaded(tmp_path, mode, attention)
        with Watch() as watch:
            loss = module(documents(3))
            held.append(watch.held())
            loss.backward()
        matmuls.append(watch.matmuls)
        gradients.append([loss.detach(), *(parameter.grad for parameter in module.parameters())])
    assert held[0] > 1.3 * held[1] > 1.3 * 1.3 * held[2], held
    assert matmuls[0] < matmuls[1] < matmuls[2], matmuls
    for other in gradients[1:]:
        for found, expected in zip(other, gradients[0], strict=True):
            assert torch.equal(found, expected), "a recomputation gives the same bits"


def test_names_and_attributes_of_layers_stay(tmp_path: Path) -> None:
    """gemma3's decoder asks each layer for its kind of attention."""
    make_family(tmp_path, "gemma3", tied=False)
    plain, recomputed = loaded(tmp_path, "none"), loaded(tmp_path, "full")
    names = [name for name, _ in recomputed.model.named_parameters()]
    assert names == [name for name, _ in plain.model.named_parameters()]
    assert list(recomputed.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        assert recomputed(documents(2)).equal(plain(documents(2)))


def compiled_and_sharded(
    folder: Path, mode: Recompute, attention: str, compiled: bool
) -> list[float]:
    """Losses of three steps over batches of different documents."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    module = build_model(folder, TrainingConfig(**{**CONFIG, "attention": attention}))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    apply_recompute(module.layers, mode)
    for layer in module.layers:
        if compiled:
            layer.compile(fullgraph=True)
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    load_weights(module, folder, torch.device("cpu"))
    optimizer, losses = torch.optim.SGD(module.parameters(), lr=1e-4), list[float]()
    for lengths in ((7, 12, 1, 13), (33,), (3, 4, 5, 6, 7, 8)):
        loss = module(documents(2, lengths))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    dist.destroy_process_group()
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("mode", "attention"), [("none", "flash"), ("selective", "flash"), ("full", "sdpa")]
)
def test_compiled_sharded_and_recomputed_layers_give_the_plain_losses(
    mode: Recompute, attention: str, size: int, tmp_path: Path
) -> None:
    """Each layer is one graph (`fullgraph`), so recomputation must be traced too."""
    make_family(tmp_path, "llama", tied=False)
    expected = run_ranks(compiled_and_sharded, size, tmp_path, "none", attention, False)
    found = run_ranks(compiled_and_sharded, size, tmp_path, mode, attention, True, timeout=300)
    for rank in range(size):
        assert found[rank] == pytest.approx(expected[rank], rel=1e-5)
    assert len(set(expected[0])) == 3
