"""Which checkpoint a run of another length continues from, and that it is then the longer run."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cpt_merge.core.artifact import write_json
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.checkpoint import STATE_FILE, TrainState
from cpt_merge.training.growth import Branch, find_checkpoint
from cpt_merge.training.schedule import RateCurve
from tests.distributed import run_ranks
from tests.training.conftest import CONFIG
from tests.training.runs import Job, assert_same_weights, train_rows

STEP = CONFIG["sequence_length"] * CONFIG["global_batch_size"]
WSD = {"shape": "wsd", "warmup": 0.25, "decay": 0.25}


def config(steps: int, **changes: Any) -> TrainingConfig:
    return TrainingConfig(**{**CONFIG, "tokens": steps * STEP, **changes})


def with_steps(folder: Path, *steps: int, **state: Any) -> Path:
    """A folder of checkpoints without weights."""
    for step in steps:
        saved = TrainState("old", step, **state)
        write_json(folder / f"step-{step:08d}" / STATE_FILE, asdict(saved))
    return folder


def continued(folder: Path, old: TrainingConfig, new: TrainingConfig) -> Branch:
    found = find_checkpoint(folder, old, new, "new", 1000)
    assert found
    assert found.state.key == "new"
    return found


def test_wsd_continues_before_the_rate_falls(tmp_path: Path) -> None:
    folder = with_steps(tmp_path, 4, 9, 11, 12)
    found = continued(folder, config(12, schedule=WSD), config(20, schedule=WSD))
    assert (found.state.step, found.rewarmed, found.repeats) == (9, False, True)
    assert RateCurve(**found.state.curve) == RateCurve(0, 20, 3), "the warmup keeps its steps"
    assert found.state.grown == [{"key": "old", "step": 9, "steps": 12, "rewarmed": False}]


def test_an_interrupted_run_continues_where_it_was(tmp_path: Path) -> None:
    folder = with_steps(tmp_path, 4, 8)
    found = continued(folder, config(12, schedule=WSD), config(20, schedule=WSD))
    assert (found.state.step, found.rewarmed, found.repeats) == (8, False, False)


def test_a_wsd_run_can_also_be_cut_short(tmp_path: Path) -> None:
    long, short = config(20, schedule=WSD), config(12, schedule=WSD)
    assert continued(with_steps(tmp_path, 8, 10), long, short).state.step == 8
    shutil.rmtree(tmp_path / "step-00000008")
    assert find_checkpoint(tmp_path, long, short, "new", 1000) is None, "its rate would have fallen"


def test_other_tokens_in_as_many_steps_change_no_step(tmp_path: Path) -> None:
    old, new = (config(12).model_copy(update={"tokens": 12 * STEP - less}) for less in (9, 0))
    found = continued(with_steps(tmp_path, 8, 12), old, new)
    assert (found.state.step, found.rewarmed, found.repeats) == (12, False, False)


def test_wsd_without_that_checkpoint_rises_again(tmp_path: Path) -> None:
    folder = with_steps(tmp_path, 11, 12)
    found = continued(folder, config(12, schedule=WSD), config(20, schedule=WSD))
    assert (found.state.step, found.rewarmed) == (12, True)
    assert RateCurve(**found.state.curve) == RateCurve(12, 20, 2, origin=0.1)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_other_shapes_rise_again_from_where_they_are(shape: str, tmp_path: Path) -> None:
    schedule = {"shape": shape, "warmup": 0.25}
    old, new = config(12, schedule=schedule), config(20, schedule=schedule)
    found = continued(with_steps(tmp_path, 8, 12), old, new)
    curve = RateCurve(**found.state.curve)
    assert (found.state.step, found.rewarmed) == (12, True)
    factors = [curve.factor(step, new.schedule) for step in range(12, 20)]
    assert factors[:3] == pytest.approx([0.4, 0.7, 1.0])
    assert factors[-1] == pytest.approx(0.1)
    assert find_checkpoint(tmp_path, new, old, "new", 1000) is None, "a shorter run starts anew"


def test_a_run_that_has_grown_grows_again(tmp_path: Path) -> None:
    first = continued(with_steps(tmp_path / "first", 9, 12), config(12, schedule=WSD), config(20, schedule=WSD))  # fmt: skip
    again = with_steps(tmp_path / "again", 15, 20, curve=first.state.curve, grown=first.state.grown)
    found = continued(again, config(20, schedule=WSD), config(40, schedule=WSD))
    assert (found.state.step, found.state.curve) == (15, asdict(RateCurve(0, 40, 3)))
    assert [one["steps"] for one in found.state.grown] == [12, 20]


def test_phases_before_the_last_one_stay_as_they_are(tmp_path: Path) -> None:
    phases = [{"train": "vocabulary", "tokens": 4 * STEP}, {"train": "all"}]
    old, new = (config(steps, schedule=WSD, phases=phases) for steps in (12, 20))
    early = continued(with_steps(tmp_path / "early", 3), old, new)
    assert early.state.curve == {}, "the last phase has not begun, so nothing holds its warmup"
    late = continued(with_steps(tmp_path / "late", 10, 12, phase=1), old, new)
    assert (late.state.step, late.state.curve) == (10, asdict(RateCurve(4, 20, 2)))
    other = config(20, schedule=WSD, phases=[{**phases[0], "tokens": 5 * STEP}, phases[1]])
    assert find_checkpoint(tmp_path / "late", old, other, "new", 1000) is None


def test_phases_that_are_added_continue_the_last_checkpoint(tmp_path: Path) -> None:
    """Longer sequences after a finished run; what it was is the first phase of the new one."""
    longer = {"train": "all", "sequence_length": 64}
    phases = [{"train": "all", "tokens": 12 * STEP}, longer]
    old, new = config(12), config(20, phases=phases)
    found = continued(with_steps(tmp_path / "done", 8, 12), old, new)
    assert (found.state.step, found.state.phase, found.rewarmed, found.repeats) == (
        12,
        0,
        False,
        False,
    )
    found = continued(with_steps(tmp_path / "stopped", 4, 8), old, new)
    assert found.state.step == 8, "the rest of its phase is the same"
    curve = asdict(RateCurve(8, 12, 1, origin=0.1))
    regrown = with_steps(tmp_path / "grown", 9, curve=curve)
    assert find_checkpoint(regrown, old, new, "new", 1000) is None, "its rate is another one"
    other = config(20, phases=[{**phases[0], "tokens": 11 * STEP}, longer])
    assert find_checkpoint(tmp_path / "done", old, other, "new", 1000) is None


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_a_grown_wsd_run_equals_one_that_was_long_from_the_start(
    backend: str, model: Path, store: Path, tmp_path: Path
) -> None:
    """Its checkpoint at step 9, where the rate begins to fall, is kept, though `every` is 4."""
    size, base = 2, {"schedule": WSD, "checkpoints": {"every": 4, "keep": 1}}
    long = {**base, "tokens": 20 * STEP, "schedule": {**WSD, "warmup": 0.15}}
    jobs = {
        "short": Job(model, store, tmp_path / "short", base, backend),
        "grown": Job(model, store, tmp_path / "grown", {**base, "tokens": 20 * STEP}, backend),
        "long": Job(model, store, tmp_path / "long", long, backend),
    }
    run_ranks(train_rows, size, jobs["short"])
    found = continued(tmp_path / "short" / "checkpoints", config(12, **base), config(20, **base))
    assert found.state.step == 9
    copy = tmp_path / "grown" / "checkpoints" / found.checkpoint.name
    shutil.copytree(found.checkpoint, copy)
    write_json(copy / STATE_FILE, {**asdict(found.state), "key": "key"})
    grown, expected = (run_ranks(train_rows, size, jobs[name])[0] for name in ("grown", "long"))
    assert sorted(grown) == list(range(10, 21))
    for name in ("train/loss", "train/gradient_norm", "train/learning_rate"):
        assert [grown[step][name] for step in grown] == [expected[step][name] for step in grown]
    assert_same_weights(tmp_path / "grown", tmp_path / "long")
    last = tmp_path / "grown" / "checkpoints" / "step-00000020" / STATE_FILE
    assert json.loads(last.read_text())["grown"] == found.state.grown
