"""Loss spikes: found where there are some, nowhere else, and the same after a resume."""

import json
import math
import random
from pathlib import Path

import pytest

from cpt_merge.training.callbacks.spikes import MINIMUM, Spike, Spikes, record_spike


def curve(steps: int, seed: int = 0) -> list[float]:
    """A loss as continual pretraining with new rows has it: a steep fall from 11, then a slow one, with noise."""
    generator = random.Random(seed)
    return [
        1.8 + 9 * math.exp(-step / 15) + 0.3 / (1 + step / 300) + generator.gauss(0, 0.03)
        for step in range(steps)
    ]


def found(spikes: Spikes, losses: list[float], first: int = 0) -> list[int]:
    return [step for step, loss in enumerate(losses, first) if spikes.observe(step, loss)]


@pytest.mark.parametrize("seed", range(10))
def test_a_falling_loss_with_noise_has_none(seed: int) -> None:
    assert found(Spikes(), curve(2000, seed)) == []


def test_a_loss_far_above_the_earlier_ones_is_one() -> None:
    losses = curve(600)
    for step in (300, 301, 500):
        losses[step] += 1
    assert found(Spikes(), losses) == [300, 301, 500]


def test_it_says_what_it_was_measured_against() -> None:
    spikes = Spikes(window=40)
    for step in range(100):
        assert spikes.observe(step, 2.0 + 0.1 * (step % 2)) is None
    spike = spikes.observe(100, 3.0)
    assert spike
    assert (spike.step, spike.loss, spike.mean, spike.deviation) == pytest.approx(
        (100, 3.0, 2.05, 0.05)
    )


def test_a_spike_does_not_hide_the_next_one() -> None:
    losses = curve(600)
    losses[300], losses[310] = 50.0, 2.9
    assert found(Spikes(), losses) == [300, 310]


def test_too_few_losses_judge_nothing_but_a_loss_that_is_not_finite_is_always_one() -> None:
    spikes = Spikes()
    assert not spikes.observe(0, 2.0)
    assert not spikes.observe(1, 200.0)
    assert spikes.observe(2, math.nan)
    assert spikes.observe(3, math.inf)


def test_a_loss_that_hardly_varies_has_none_in_its_noise() -> None:
    assert found(Spikes(), [2.0] * 200 + [2.001]) == []


def test_a_new_level_is_told_for_a_while_and_then_is_the_level() -> None:
    losses = curve(300) + [loss + 2 for loss in curve(800)[300:]]
    assert found(Spikes(), losses) == list(range(300, 300 + MINIMUM))


@pytest.mark.parametrize("at", [10, 301, 450])
def test_a_resume_continues_exactly(at: int) -> None:
    losses = curve(600)
    for step in range(300, 310):
        losses[step] += 1
    whole, first, second = Spikes(), Spikes(), Spikes()
    expected = [whole.observe(step, loss) for step, loss in enumerate(losses)]
    for step in range(at):
        first.observe(step, losses[step])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.observe(step, losses[step]) for step in range(at, 600)] == expected[at:]
    assert any(expected)


def test_the_record_names_the_rows_of_the_step_and_is_written_once(tmp_path: Path) -> None:
    path, rows = tmp_path / "spikes.jsonl", [("위키", 17), ("web", 3)]
    for _ in range(2):
        record_spike(path, Spike(5, 9.5, 2.0, 0.1), range(10, 12), rows)
    record_spike(path, Spike(6, math.nan, 2.0, 0.1), range(12, 14), rows)
    one, two = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    assert one == {
        "step": 5, "loss": 9.5, "mean": 2.0, "deviation": 0.1,
        "first_index": 10, "last_index": 11, "sequences": [["위키", 17], ["web", 3]],
    }  # fmt: skip
    assert two["loss"] is None
