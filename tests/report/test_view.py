"""What the report reads of a run: scores, outdated results, numbers."""

import json
import math

import pytest

from cpt_merge.core.artifact import write_json
from cpt_merge.core.errors import UserError
from cpt_merge.report import report
from cpt_merge.report.view import Pivot, duration, number, read_run, score_pivots
from cpt_merge.tracking import read_log
from tests.report.runs import SCORES, Page, record, start


def test_metrics_are_shown_in_the_form_that_the_evaluation_gives(run):
    evaluation = read_log(run / "evaluation" / "log")
    assert score_pivots(evaluation)["chat"].rows[0] == ["base", "50%"], (
        "an older log, without eval/metrics"
    )
    rows = [
        ["merged", "ko", figure, value, value, value, 5]
        for figure, value in (("turns", 0.25), ("judge_score", 7.5))
    ]
    tracker = start(run, "evaluation")
    tracker.table("eval/scores", SCORES, rows)
    tracker.table(
        "eval/metrics",
        ["evaluator", "metric", "heading", "meaning", "more is better", "share"],
        [
            ["dialogue", "turns", "turns", "turns passed", True, True],
            ["judge", "judge_score", "score", "of 10", False, False],
        ],
    )
    tracker.table(
        "eval/not_run",
        ["model", "metric", "reason"],
        [["merged", "flagged", "the endpoint is dead"]],
    )
    pivots = score_pivots(read_log(run / "evaluation" / "log"))
    assert pivots == {
        "turns": Pivot(["ko"], [["merged", "25%"]]),
        "judge_score": Pivot(["ko"], [["merged", "7.500"]]),
    }
    report(run)
    page = Page(run)
    assert "25" in page.chart("Dialogue: turns")
    assert "7.5" in page.chart("Judge: score")
    for words in ("of 10; lower is better", "the endpoint is dead"):
        assert words in page.words


def test_a_complete_run_has_no_marks_of_older_inputs(complete, capsys):
    report(complete)
    assert "all 6 stages are finished" in Page(complete).words
    assert "older inputs" not in Page(complete).words + capsys.readouterr().err


@pytest.mark.parametrize("state", ["trained anew", "training anew"])
def test_results_of_an_older_training_are_marked_wherever_they_are_shown(complete, capsys, state):
    if state == "trained anew":
        record(
            complete,
            "training",
            "c2",
            {"model": "stage:e1", "data": "stage:d1"},
            "2026-11-28T10:00:00+00:00",
        )
    else:
        (complete / "training" / "stage.json").unlink()
        path = complete / "training" / "log" / "run.json"
        write_json(
            path, {**json.loads(path.read_text(encoding="utf-8")), "settings": {"key": "c2"}}
        )
    report(complete)
    assert read_run(complete).older == {"merge": ["training"], "evaluation": ["training"]}
    shown, page = capsys.readouterr().err, Page(complete)
    for words in (
        "merge        finished, older",
        "evaluation   finished, older",
        "evaluation, chat, from older inputs: training",
        "evaluation was made from older inputs: training; run it again",
    ):
        assert words in shown
    assert "all 6 stages are finished" not in page.words
    for words in (
        "Evaluation from older inputs: training",
        "Sample replies from older inputs: training",
        "Merge from older inputs: training",
        "Tokenizer",
    ):
        assert words in page.words
    assert "Tokenizer from older" not in page.words
    tile = page.words[page.words.index("Good replies, ko") :]
    assert "from older inputs: training" in tile[: tile.index("Training loss")]
    verdict = "finished, but made from older inputs: merge, evaluation; run them again"
    assert (verdict in page.words) == (state == "trained anew")


def test_older_inputs_are_inherited_by_later_stages_and_changed_text_counts(complete):
    record(
        complete,
        "tokenizer",
        "k2",
        {"base": "b1", "text ko.jsonl": "t2"},
        "2026-11-28T10:00:00+00:00",
    )
    assert read_run(complete).older == {
        "embeddings": ["tokenizer"],
        "data": ["tokenizer", "text"],
        "training": ["tokenizer", "text"],
        "merge": ["tokenizer", "text"],
        "evaluation": ["tokenizer", "text"],
    }


def test_a_continued_training_with_the_same_settings_makes_nothing_older(complete):
    (complete / "training" / "stage.json").unlink()
    path = complete / "training" / "log" / "run.json"
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "settings": {"key": "c1"}})
    assert read_run(complete).older == {}


def test_unknown_run(tmp_path, run):
    with pytest.raises(
        UserError, match=r"runs/dmo contains no stage of a run; .*; runs in .*: demo"
    ):
        report(run.parent / "dmo")
    with pytest.raises(UserError, match="contains no stage of a run"):
        report(tmp_path / "no" / "where")


def test_numbers_and_durations():
    values = (None, True, 6016, 4915200.0, 0.70512, 2e-5, 12345.6, "x", math.nan)
    texts = ["–", "yes", "6,016", "4,915,200", "0.7051", "2e-05", "12,346", "x", "not finite"]
    assert [number(value) for value in values] == texts
    assert [duration(seconds) for seconds in (1.23, 42, 200, 18720)] == [
        "1.2 s",
        "42 s",
        "3 min 20 s",
        "5 h 12 min",
    ]
