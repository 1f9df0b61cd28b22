"""The learning rate is a pure function of the step, and decay touches matrices only."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from cpt_merge.training.config import ScheduleConfig, TrainingConfig
from cpt_merge.training.model.build import build_model, load_weights
from cpt_merge.training.optimizer import build_optimizer, set_rate
from cpt_merge.training.phases import Phase
from cpt_merge.training.schedule import RateCurve
from tests.training.conftest import CONFIG


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd"])
def test_it_rises_to_the_peak_and_falls_to_the_final_factor(shape: Any) -> None:
    schedule = ScheduleConfig(shape=shape, warmup=0.1, decay=0.3, final=0.2)
    factors = [RateCurve.over(0, 100, schedule).factor(step, schedule) for step in range(100)]
    assert 0 < factors[0] < 0.2
    assert max(factors) == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.2)
    assert all(a <= b for a, b in pairwise(factors[:10]))
    assert all(a >= b for a, b in pairwise(factors[10:]))


def test_wsd_is_flat_between_warmup_and_decay() -> None:
    schedule = ScheduleConfig(shape="wsd", warmup=0.1, decay=0.3)
    assert {RateCurve.over(0, 100, schedule).factor(step, schedule) for step in range(10, 70)} == {
        1.0
    }


def test_a_run_of_one_step_has_a_rate() -> None:
    for shape in ("cosine", "linear", "wsd"):
        schedule = ScheduleConfig(shape=shape)
        assert 0 < RateCurve.over(0, 1, schedule).factor(0, schedule) <= 1


def test_groups(model: Path) -> None:
    config = TrainingConfig(**CONFIG)
    module = build_model(model, config)
    load_weights(module, model, torch.device("cpu"))
    optimizer = build_optimizer(module, config, Phase(0, "all", 0, 1, 0.1, 0.3, config.context))
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            assert group["weight_decay"] == (0.0 if "norm" in name else 0.1), name
            assert group["peak"] == (0.3 if "embed" in name or "lm_head" in name else 0.1), name
    assert not names, "every parameter is in one group"
    set_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.05, 0.15}
