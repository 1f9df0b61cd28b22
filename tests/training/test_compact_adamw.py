"""AdamW with 8-bit moments and with stochastic rounding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cpt_merge.training.compact_adamw import (
    CompactAdamW,
    dequantised,
    levels,
    quantised,
    stochastic_bf16,
)
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.optimizer import bytes_of_moments
from tests.distributed import run_ranks
from tests.training.conftest import CONFIG
from tests.training.runs import Job, assert_same_weights, reference_losses, train

CPU = torch.device("cpu")
GROUP = {"lr": 1e-3, "weight_decay": 0.1}
SETTINGS: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}


def compact(parameters: Any, eight_bits: bool = False) -> CompactAdamW:
    group = {"params": list(parameters), **GROUP}
    return CompactAdamW([group], **SETTINGS, eight_bits=eight_bits, seed=0)


def torchs(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW([{"params": list(parameters), **GROUP}], **SETTINGS, fused=True)


def learn(
    make: Callable[[Any], torch.optim.Optimizer],
    steps: int,
    dtype: torch.dtype = torch.float32,
    skipped: tuple[int, ...] = (),
) -> tuple[list[float], list[Tensor]]:
    """Losses and last weights of a small network that learns to give back its input."""
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(300, 64), nn.Tanh(), nn.Linear(64, 300)).to(dtype)
    data, optimizer, losses = torch.randn(64, 300).to(dtype), make(module.parameters()), []
    for step in range(steps):
        loss = (module(data) - data).float().square().mean()
        loss.backward()
        optimizer.found_inf = torch.tensor(float(step in skipped))  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [parameter.detach() for parameter in module.parameters()]


def test_levels_are_those_of_the_paper() -> None:
    """Figure 4 of 8-Bit Approximations: a sign, decades, and a fraction that is finer in higher ones."""
    signed, positive = levels(True, CPU), levels(False, CPU)
    assert len(signed.unique()) == len(positive.unique()) == 256
    assert {0.0, 1.0} <= set(signed.tolist()) & set(positive.tolist())
    for found, parts in ((signed, 64), (positive, 128)):
        assert ((found > 0.1) & (found < 1)).sum() == parts
        assert ((found > 0.01) & (found < 0.1)).sum() == parts // 2
    assert torch.equal((-signed[signed < 0]).sort().values, signed[(signed > 0) & (signed < 1)])


@pytest.mark.parametrize("columns", [1, 255, 256, 700])
@pytest.mark.parametrize("signed", [True, False])
def test_values_come_back_near_and_blocks_do_not_leave_their_row(
    columns: int, signed: bool
) -> None:
    torch.manual_seed(0)
    values = torch.randn(5, columns) * torch.logspace(-6, 6, 5)[:, None]
    values = values if signed else values.square()
    codes, scales = quantised(values, signed)
    assert codes.shape == values.shape
    assert scales.shape == (5, -(-columns // 256))
    largest = values.abs().amax(1, keepdim=True)
    assert ((dequantised(codes, scales, signed) - values).abs() / largest).max() < 0.008
    rows = [quantised(row[None], signed) for row in values]
    assert torch.equal(torch.cat([row[0] for row in rows]), codes)


@pytest.mark.parametrize("signed", [True, False])
def test_what_comes_back_gives_the_same_codes_and_scales(signed: bool) -> None:
    torch.manual_seed(0)
    values = torch.randn(40, 700) * torch.logspace(-20, 6, 40)[:, None]
    codes, scales = quantised(values if signed else values.square(), signed)
    again = quantised(dequantised(codes, scales, signed), signed)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scales)


def test_zero_stays_zero_and_nothing_else_becomes_it() -> None:
    values = torch.tensor([[0.0, 1e-30, 1e-12, 1.0], [0.0, 0.0, 0.0, 0.0]])
    codes, scales = quantised(values, signed=False)
    assert torch.equal(dequantised(codes, scales, signed=False) > 0, values > 0)


def test_in_fp32_it_is_torchs_adamw_bit_for_bit_also_where_steps_are_skipped() -> None:
    expected, weights = learn(torchs, 12, skipped=(0, 5))
    found, mine = learn(compact, 12, skipped=(0, 5))
    assert found == expected
    assert all(torch.equal(one, other) for one, other in zip(mine, weights, strict=True))


def test_a_parameter_may_be_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = learn(lambda one: compact(one, eight_bits=True), 12, skipped=(5,))
    monkeypatch.setattr("cpt_merge.training.compact_adamw.AT_ONCE_ON_CPU", 1024)
    found, _ = learn(lambda one: compact(one, eight_bits=True), 12, skipped=(5,))
    assert found == pytest.approx(expected, rel=1e-6)


def test_8_bit_moments_learn_as_fp32_ones_do() -> None:
    expected, _ = learn(torchs, 150)
    found, _ = learn(lambda one: compact(one, eight_bits=True), 150)
    assert found == pytest.approx(expected, rel=0.1)
    assert found[:30] == pytest.approx(expected[:30], rel=2e-3)


def test_a_row_without_gradients_moves_no_further_than_with_fp32_moments() -> None:
    """An embedding's row between two steps with its token: moments shrink, and gradients are zero."""
    gradient = torch.logspace(-6, 0, 256).repeat(2, 1)
    ends = []
    for make in (torchs, lambda one: compact(one, eight_bits=True)):
        parameter = nn.Parameter(torch.zeros(2, 256))
        optimizer = make([parameter])
        for step in range(8):
            parameter.grad = gradient if step == 0 else torch.zeros_like(gradient)
            optimizer.step()
        ends.append(parameter.detach())
    assert ends[1].abs().max() < 1.5 * ends[0].abs().max()


def test_rounding_is_right_on_average_and_exact_where_bf16_is() -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.full((100_000,), 1.001)
    rounded = stochastic_bf16(values, draw).float()
    assert set(rounded.tolist()) == {1.0, 1.0078125}
    assert rounded.mean().item() == pytest.approx(1.001, abs=1e-4)
    exact = torch.tensor([0.0, -1.5, 3e38, float("inf")]).bfloat16().float()
    assert torch.equal(stochastic_bf16(exact, draw).float(), exact)
    assert stochastic_bf16(-values, draw).float().mean().item() == pytest.approx(-1.001, abs=1e-4)


@pytest.mark.parametrize(("dtype", "end"), [(torch.bfloat16, 0.99), (torch.float32, 0.99)])
def test_updates_below_half_a_bf16_step_are_not_lost(dtype: torch.dtype, end: float) -> None:
    """Rounding to nearest would leave every weight at 1."""
    parameter = nn.Parameter(torch.ones(64, 64, dtype=dtype))
    optimizer = compact([parameter])
    optimizer.param_groups[0] |= {"lr": 1e-4, "weight_decay": 0.0}
    for _ in range(100):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert parameter.float().mean().item() == pytest.approx(end, abs=5e-4)


def test_bf16_moments_follow_gradients_that_change_slowly() -> None:
    """With a beta2 of 0.999, a step changes the second moment by less than bf16 can hold."""
    parameter = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = compact([parameter])
    optimizer.param_groups[0] |= {"lr": 0.0, "betas": (0.9, 0.999)}
    for gradient in [1.0] * 100 + [0.5] * 400:
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    exact = (1 - 0.999**100) * 0.999**400 + 0.25 * (1 - 0.999**400)
    found = optimizer.state[parameter]["exp_avg_sq"].float().mean().item()
    assert found == pytest.approx(exact, rel=0.01)


def test_what_was_saved_goes_on_bit_for_bit() -> None:
    def network() -> nn.Parameter:
        return nn.Parameter(torch.ones(16, 300, dtype=torch.bfloat16))

    def steps(parameter: nn.Parameter, optimizer: CompactAdamW, numbers: range) -> None:
        for number in numbers:
            parameter.grad = torch.full_like(parameter, 1.0 + number)
            optimizer.step()

    whole, first, second = network(), network(), network()
    steps(whole, compact([whole], True), range(6))
    optimizer = compact([first], True)
    steps(first, optimizer, range(3))
    second.data.copy_(first)
    resumed = compact([second], True)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state[second]["exp_avg"].dtype == torch.uint8
    assert resumed.state[second]["exp_avg_scale"].dtype == torch.float32
    steps(second, resumed, range(3, 6))
    assert torch.equal(whole, second)


EIGHT_BITS = {"optimizer": {**CONFIG["optimizer"], "moments": "8bit"}}
ROUNDED = {
    "precision": "pure-bf16",
    "optimizer": {**CONFIG["optimizer"], "moments": "8bit"},
}
RUNS = [
    pytest.param("fsdp2", 2, EIGHT_BITS, id="fsdp2-2"),
    pytest.param("fsdp2", 3, ROUNDED, id="fsdp2-3-rounded", marks=pytest.mark.slow),
    pytest.param("hsdp", 4, ROUNDED, id="hsdp-4-rounded", marks=pytest.mark.slow),
    *(
        pytest.param(backend, 2, EIGHT_BITS, id=backend, marks=pytest.mark.slow)
        for backend in ("zero1", "zero2", "zero3")
    ),
]


def batch_for(size: int, changes: dict[str, Any]) -> dict[str, Any]:
    """Three processes take nine sequences."""
    return changes if size != 3 else {**changes, "global_batch_size": 9, "tokens": 32 * 9 * 12}


@pytest.mark.parametrize(("backend", "size", "changes"), RUNS)
def test_a_run_learns_as_with_full_moments_and_resumes_bit_for_bit(
    backend: str, size: int, changes: dict[str, Any], model: Path, store: Path, tmp_path: Path
) -> None:
    changes = batch_for(size, changes)
    whole = run_ranks(train, size, Job(model, store, tmp_path / "whole", changes, backend))[0]
    if size != 3:
        expected = reference_losses(model, store)
        near = 2e-2 if "precision" in changes else 2e-3
        assert whole == pytest.approx(expected, rel=near)
    stopped = Job(model, store, tmp_path / "parts", changes, backend, stop_after=5)
    first = run_ranks(train, size, stopped)[0]
    stopped.stop_after = 0
    second = run_ranks(train, size, stopped)[0]
    assert {**first, **second} == whole
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp2", "zero2", "zero3"])
def test_a_checkpoint_continues_on_another_number_of_processes(
    backend: str, model: Path, store: Path, tmp_path: Path
) -> None:
    whole = run_ranks(train, 1, Job(model, store, tmp_path / "whole", EIGHT_BITS))[0]
    job = Job(model, store, tmp_path / "parts", EIGHT_BITS, backend, stop_after=5)
    run_ranks(train, 2, job)
    job.stop_after = 0
    second = run_ranks(train, 4, job)[0]
    assert max(second) == 12
    near = 2e-4 if backend == "fsdp2" else 1e-3  # DeepSpeed's blocks are others
    assert second == pytest.approx({step: whole[step] for step in second}, rel=near)


@pytest.mark.slow
def test_fsdp_and_deepspeed_divide_8_bit_moments_differently(
    model: Path, store: Path, tmp_path: Path
) -> None:
    run_ranks(train, 2, Job(model, store, tmp_path, EIGHT_BITS, "zero2", stop_after=5))
    sentence = (
        "written by DeepSpeed, with moments in 8 bits and cannot be loaded by torch; continue"
    )
    with pytest.raises(AssertionError, match=sentence):
        run_ranks(train, 2, Job(model, store, tmp_path, EIGHT_BITS))


def test_runs_without_8_bit_moments_keep_their_identity() -> None:
    plain = TrainingConfig(**CONFIG).identity()
    assert "moments" not in plain["optimizer"]
    assert "rounding" not in plain
    assert TrainingConfig(**{**CONFIG, **EIGHT_BITS}).identity() != plain


@pytest.mark.parametrize("columns", [700, 1024])
def test_what_a_checkpoint_takes_is_what_is_stored(columns: int) -> None:
    parameter = nn.Parameter(torch.zeros(512, columns))
    optimizer = compact([parameter], eight_bits=True)
    state = optimizer.fresh_state(parameter)
    stored = sum(value.nbytes for name, value in state.items() if name != "step")
    assert bytes_of_moments(optimizer, parameter.numel(), 4) == pytest.approx(stored, rel=0.02)
    assert optimizer.describe() == "AdamW, moments of 100.0% of the trained weights in 8 bits"
