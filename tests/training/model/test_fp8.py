"""fp8 is refused in words where it cannot run."""

from pathlib import Path

import pytest
import torch
from torch import nn

from cpt_merge.core.errors import UserError
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.model.build import build_model
from cpt_merge.training.model.fp8 import _fits, convert_to_fp8
from tests.training.conftest import CONFIG


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_run_without_a_gpu_is_refused(model: Path) -> None:
    with pytest.raises(UserError, match=r"training.fp8 needs a GPU of capability 8\.9"):
        build_model(model, TrainingConfig(**{**CONFIG, "fp8": True}))


def test_an_older_gpu_and_a_missing_torchao_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device, capability = torch.device("cuda", 0), (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with pytest.raises(UserError, match="capability"):
        convert_to_fp8(nn.ModuleList(), device)
    capability = (9, 0)
    monkeypatch.setattr("cpt_merge.training.model.fp8.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs torchao, which is not installed"):
        convert_to_fp8(nn.ModuleList(), device)


def test_only_linear_layers_of_fitting_sizes_are_converted() -> None:
    assert _fits(nn.Linear(32, 64), "")
    assert not _fits(nn.Linear(32, 60), "")
    assert not _fits(nn.Embedding(32, 64), "")


def test_weights_follow_from_it() -> None:
    """A run in bf16 does not continue in float8, nor count as one in float8."""
    assert TrainingConfig(tokens=1, fp8=True).identity() != TrainingConfig(tokens=1).identity()
