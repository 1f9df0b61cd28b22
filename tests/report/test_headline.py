"""The verdict at the top of the page, and the differences that are no chance."""

from pathlib import Path

import pytest

from cpt_merge.report.bars import Bar, BarSeries, draw_bars
from cpt_merge.report.headline import verdict
from cpt_merge.report.view import changes_of, read_run, title_of
from cpt_merge.tracking import TrackingConfig, start_tracker

SCORES = [
    ("base", "ko", "chat", 0.0), ("cpt", "ko", "chat", 0.0), ("merged", "ko", "chat", 0.96),
    ("cpt", "ko", "bits_per_byte", 1.5), ("merged", "ko", "bits_per_byte", 1.65),
    ("chat", "en", "chat", 1.0), ("merged", "en", "chat", 0.5),
]  # fmt: skip
DIFFERENCES = [
    ["merged", "ko", "chat", 0.96, 0.8, 1.0, 20, 0.001, True],
    ["merged", "en", "chat", 0.5, -0.1, 0.9, 4, 0.2, False],
    ["merged", "ko", "bits_per_byte", -0.25, -0.3, -0.2, 9, 0.001, True],
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "evaluation"
    config = TrackingConfig(mode="disabled")
    tracker = start_tracker(config, "evaluation", "n", "g", folder / "log", {}, "id")
    columns = ["model", "language", "metric"]
    rows = [[*names, value, value, value, 20] for *names, value in SCORES]
    tracker.table("eval/scores", [*columns, "value", "low", "high", "n"], rows)
    changes = [*columns, "minus base", "low", "high", "n", "p", "beyond"]
    tracker.table("eval/differences", changes, DIFFERENCES)
    tracker.finish()
    return tmp_path


def test_the_verdict_says_what_came_of_it_and_what_may_be_chance(run: Path) -> None:
    assert verdict(read_run(run)) == [
        "Korean: 96% of the replies are good (0% before the vector); text is predicted 10% worse "
        "than before the vector.",
        "English: 50% of the replies are good (100% for the chat model), which may be chance.",
    ]


def test_only_differences_beyond_chance_are_listed(run: Path) -> None:
    found = changes_of(read_run(run).log("evaluation"))
    assert [(one.language, one.what, one.change, one.interval) for one in found] == [
        ("ko", "Good replies", "+96 points", "+80 points to +100 points"),
        ("ko", "Bits per byte", "-0.250", "-0.300 to -0.200"),
    ]


def test_before_an_evaluation_there_is_no_verdict(tmp_path: Path) -> None:
    config = TrackingConfig(mode="disabled")
    start_tracker(config, "tokenizer", "n", "g", tmp_path / "tokenizer" / "log", {}, "id").finish()
    assert verdict(read_run(tmp_path)) == []


def test_tables_are_called_by_words() -> None:
    assert title_of("eval/differences") == "All differences, with intervals and p-values"
    assert title_of("data/some_thing") == "Some thing"


def test_bars_that_would_hide_the_others_are_cut_off() -> None:
    series = [
        BarSeries("base", [Bar.exact(18.5)], "k-base"),
        BarSeries("cpt", [Bar.exact(1.1)], "k-cpt"),
    ]
    whole, cut = draw_bars("t", ["ko"], series), draw_bars("t", ["ko"], series, clip=3.3)
    assert (whole.count('class="gap"'), cut.count('class="gap"')) == (0, 1)
    assert ">18.5</text>" in cut, "the value is told all the same"
