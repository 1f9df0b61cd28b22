"""Phases with mixtures of their own: which steps read what, and what continues."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cpt_merge.core.artifact import write_json
from cpt_merge.core.errors import UserError
from cpt_merge.data.sources import Corpus
from cpt_merge.data.store import Store
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.checkpoint import STATE_FILE
from cpt_merge.training.growth import find_checkpoint
from cpt_merge.training.phases import phases_of
from cpt_merge.training.stretches import (
    bytes_read,
    describe_stretches,
    same_until,
    stretches_of,
    whole_run,
)
from tests.distributed import run_ranks
from tests.training.conftest import CONFIG
from tests.training.runs import Job, assert_same_weights, train_rows

STEP = 100  # tokens
CORPUS = Corpus(
    sources=[
        {"path": "web.jsonl", "language": "ko", "weight": 3},
        {"path": "best.jsonl", "language": "ko"},
        {"path": "en.jsonl", "language": "en"},
    ]  # type: ignore[list-item]
)
SIZES = [10_000, 500, 10_000]
ANNEALED = {"ko:web": 0, "ko:best": 3, "en": 1}


def config(*phases: dict[str, Any], steps: int = 100, **changes: Any) -> TrainingConfig:
    return TrainingConfig(
        tokens=steps * STEP, sequence_length=20, global_batch_size=5, phases=list(phases), **changes
    )


ALL = {"train": "all", "tokens": 90 * STEP}
LAST = {"train": "all", "weights": ANNEALED}


def test_each_phase_has_its_shares_and_epochs_add_up() -> None:
    first, second = stretches_of(config(ALL, LAST), CORPUS, SIZES)
    assert (first.start, first.stop, second.start, second.stop) == (0, 90, 90, 100)
    assert [share.share for share in first.shares] == pytest.approx([0.6, 0.2, 0.2])
    assert [share.share for share in second.shares] == pytest.approx([0, 0.75, 0.25])
    assert second.shares[1].epochs == pytest.approx(1.5)
    whole = whole_run([first, second])
    assert whole[1].epochs == pytest.approx(3.6 + 1.5)
    assert sum(share.share for share in whole) == pytest.approx(1)


def test_shares_of_languages_in_a_phase() -> None:
    only = {"train": "all", "shares": {"en": 1.0}}
    _, second = stretches_of(config(ALL, only), CORPUS, SIZES)
    assert [share.share for share in second.shares] == [0, 0, 1]


def test_a_run_with_one_mixture_is_one_stretch() -> None:
    warm = {"train": "new_rows", "tokens": 10 * STEP}
    plain, phased = (
        stretches_of(one, CORPUS, SIZES) for one in (config(), config(warm, LAST | {"weights": {}}))
    )
    assert plain == phased
    assert len(plain) == 1


@pytest.mark.parametrize(
    ("phases", "bounds"),
    [
        ((ALL, LAST), [(0, 100)]),
        ((ALL, {"train": "all"}), [(0, 90), (90, 100)]),
        ((ALL, LAST | {"learning_rate": 1e-3}), [(0, 90), (90, 100)]),
        ((ALL | {"train": "vocabulary"}, LAST), [(0, 90), (90, 100)]),
    ],
)
def test_only_a_change_of_the_mixture_alone_keeps_the_optimizer(
    phases: tuple[dict[str, Any], ...], bounds: list[tuple[int, int]]
) -> None:
    found = phases_of(config(*phases))
    assert [(phase.start, phase.stop) for phase in found] == bounds
    assert [phase.number for phase in found] == list(range(len(bounds)))


def test_with_adapters_the_mixture_may_change_and_nothing_else() -> None:
    config(ALL, LAST, lora={})
    with pytest.raises(ValueError, match="put that phase last"):
        config(ALL, {"train": "all"}, lora={})


def test_keys_of_runs_without_mixtures_stay() -> None:
    assert config(ALL, {"train": "all"}).identity()["phases"][0].keys() == {
        "train", "tokens", "learning_rate", "embedding_learning_rate",
    }  # fmt: skip
    assert config(ALL, LAST).identity()["phases"][1]["weights"] == ANNEALED


@pytest.mark.parametrize(
    ("other", "until"),
    [
        (config(ALL, LAST, steps=120), 100),
        (config(ALL, LAST | {"weights": {"en": 9}}), 90),
        (config(), 90),
        (config(ALL | {"weights": {"en": 2}}, LAST), 0),
        (config(ALL | {"tokens": 50 * STEP}, LAST), 50),
    ],
)
def test_until_where_two_runs_read_the_same(other: TrainingConfig, until: int) -> None:
    runs = [stretches_of(one, CORPUS, SIZES) for one in (config(ALL, LAST), other)]
    assert same_until(*runs) == same_until(*reversed(runs)) == until


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"weights": {"ko:wbe": 1}}, "`weights` names ko:wbe, but there are ko:web, ko:best"),
        ({"shares": {"ja": 1.0}}, "`shares` names ja, but there are ko, en"),
        ({"weights": {"ko": 0, "en": 0}}, r"training.phases.1: no source of .* has a weight above"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        stretches_of(config(ALL, {"train": "all", **changes}), CORPUS, SIZES)
    budget = CORPUS.sources[1].model_copy(update={"tokens": 500})
    budgets = CORPUS.model_copy(update={"sources": [CORPUS.sources[0], budget, CORPUS.sources[2]]})
    with pytest.raises(UserError, match=r"phases\.1: ko:best has `tokens` or `epochs`"):
        stretches_of(config(ALL, LAST), budgets, SIZES)


def test_each_mixture_is_shown_with_its_steps() -> None:
    lines = describe_stretches(stretches_of(config(ALL, LAST), CORPUS, SIZES))
    assert lines[0] == "steps 1 to 90"
    assert lines[4] == "steps 91 to 100"
    assert "75.00%" in lines[6]


@pytest.mark.slow
def test_a_mixture_that_is_added_later_gives_the_run_that_had_it_from_the_start(
    model: Path, store: Path, corpus: Corpus, tmp_path: Path
) -> None:
    """Bit for bit, also after an interruption within the mixture."""
    step = CONFIG["sequence_length"] * CONFIG["global_batch_size"]
    base = {"schedule": {"shape": "wsd", "warmup": 0.25, "decay": 0.5}}
    often, rarely = (
        {"checkpoints": {"every": every, "keep": keep}} for every, keep in ((4, 3), (5, 1))
    )
    phases = [{"train": "all", "tokens": 4 * step}, {"train": "all", "weights": {"en": 0}}]
    jobs = {
        name: Job(model, store, tmp_path / name, changes, corpus=corpus, stop_after=stop)
        for name, changes, stop in (
            ("plain", base | often, 0),
            ("phased", {**base, **rarely, "phases": phases}, 0),
            ("grown", {**base, "phases": phases}, 8),
        )
    }  # fmt: skip
    plain, phased = (run_ranks(train_rows, 2, jobs[name])[0] for name in ("plain", "phased"))
    sizes = [source.train.tokens for source in Store.open(store).info.sources]
    old, new = (jobs[name].config for name in ("plain", "phased"))
    stretches = [stretches_of(one, corpus, sizes) for one in (old, new)]
    checkpoints = {path.name for path in (tmp_path / "phased" / "checkpoints").glob("step-*")}
    assert {"step-00000004", "step-00000006"} <= checkpoints, "where mixture and rate change"
    until = same_until(*stretches)
    back = find_checkpoint(tmp_path / "plain" / "checkpoints", old, new, "key", until)
    assert back
    assert back.state.step == 4
    copy = tmp_path / "grown" / "checkpoints" / back.checkpoint.name
    shutil.copytree(back.checkpoint, copy)
    write_json(copy / STATE_FILE, asdict(back.state))
    first = run_ranks(train_rows, 2, jobs["grown"])[0]
    jobs["grown"].stop_after = 0
    grown = first | run_ranks(train_rows, 2, jobs["grown"])[0]
    assert sorted(grown) == list(range(5, 13))
    losses = {name: [rows[n]["train/loss"] for n in grown] for name, rows in
              (("grown", grown), ("phased", phased), ("plain", plain))}  # fmt: skip
    assert losses["grown"] == losses["phased"]
    assert losses["plain"] != losses["phased"]
    assert all(plain[n]["train/loss"] == phased[n]["train/loss"] for n in range(1, 5))
    assert_same_weights(tmp_path / "grown", tmp_path / "phased")
    assert [phased[n]["train/mixture"] for n in (4, 5)] == [1, 2]
    assert "train/mixture" not in plain[5]
    read = bytes_read(stretches[1], Store.open(store), 12, step)
    assert phased[12]["train/bytes"] == read
    assert phased[12]["train/learning_rate"] == plain[12]["train/learning_rate"]
