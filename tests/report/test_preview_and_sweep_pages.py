"""`cpt-merge report` of runs whose training was previewed and whose ratio was swept."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cpt_merge.report import report
from cpt_merge.tracking import Tracker
from tests.report.runs import SCORES, Page, finish, start, train

REPLIES = [
    "step",
    "language",
    "prompt",
    "reply",
    "stopped",
    "in_language",
    "keeps_format",
    "repetition",
    "chat",
]
SENTENCE = "recommended: 0.5 (chat 0.750, within 0.02 of the best, 0.760 at 1)."


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "demo"
    start(run, "tokenizer").table("fertility", ["language", "tokens"], [["ko", 1.25]])
    finish(run, "tokenizer", {})
    return run


def preview(training: Tracker, steps: range, last: int) -> None:
    """Previews of ever better replies; each asks one prompt in each of two languages."""
    rows = []
    for step in steps:
        share = step / last
        metrics = {f"preview/{one}/chat": share for one in ("ko", "zh_tw")} | {
            "preview/ko/stopped": 1.0
        }
        training.log({**metrics, "preview/seconds": 1.5, "train/tokens": step * 64.0}, step=step)
        for language, prompt in (("ko", "수도는?"), ("zh_tw", "首都是？")):
            rows.append(
                [step, language, prompt, f"<{language}> at {step}", 1.0, share, 1.0, 0.25, share]
            )
        training.table("preview/replies", REPLIES, rows)


def sweep(run: Path, recommended: float | None = 0.5) -> None:
    tracker = start(run, "sweep")
    chat = {0.0: 0.0, 0.5: 0.75, 1.0: 0.76}
    rows = [
        [
            f"{ratio:g}",
            value,
            1 + ratio,
            "bits per byte +12.0%" if ratio == 1 else "",
            ratio == recommended,
        ]
        for ratio, value in chat.items()
    ]
    tracker.table(
        "sweep/ratios", ["ratio", "chat", "bits_per_byte", "beyond the limits", "recommended"], rows
    )
    tracker.table(
        "sweep/points",
        ["ratio", "language", *SCORES[2:]],
        [["0.5", "ko", "chat", 0.75, 0.5, 1.0, 4]],
    )
    for figure in ("chat", "bits_per_byte"):
        curve = [[one, ratio, value] for one in ("ko", "zh_tw") for ratio, value in chat.items()]
        tracker.table(f"sweep/{figure}", ["language", "ratio", figure], curve)
    if recommended is not None:
        tracker.summary({"sweep/recommendation": SENTENCE, "sweep/recommended_ratio": recommended})
        finish(run, "sweep", {"points": 3})


def shown_by(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Page, str]:
    report(run)
    return Page(run), " ".join(capsys.readouterr().err.split())


def test_the_preview_has_curves_and_its_newest_replies(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preview(train(run), range(0, 60, 10), 50)
    page, terminal = shown_by(run, capsys)
    for axis in ("step", "tokens"):
        chart = page.chart(f"Good replies by {axis}")
        assert chart.count("<polyline") == 2, "a line for each language"
    assert '<polyline class="k-l1"' in page.chart("Good replies by step")
    assert page.words.count("step 50") >= 2
    newest, earlier = page.words.index("<ko> at 50"), page.words.index("<ko> at 40")
    assert newest < page.words.index("earlier (5)") < earlier
    assert "25 % repeated" in page.words
    assert "Preview of the chat model 100 % good replies at step 50" in page.words, (
        "the run is not evaluated"
    )
    assert "preview of the chat model at step 50 language chat stopped" in terminal
    assert "ko 100% 100% zh_tw 100% –" in terminal
    assert "zh_tw 首都是？ <zh_tw> at 50" in terminal
    assert "at 40" not in terminal
    assert "preview/ko/chat" not in terminal, "it has a table of its own"


def test_some_replies_of_many_previews_are_shown_with_the_newest(run: Path) -> None:
    preview(train(run), range(0, 40), 39)
    report(run)
    page = Page(run)
    assert page.source.count("&lt;ko&gt; at ") == 8
    assert "<ko> at 0 " in page.words
    assert "<ko> at 39" in page.words


def test_the_sweep_has_curves_a_table_and_its_recommendation(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(run)
    page, terminal = shown_by(run, capsys)
    chart = page.chart("Good replies by ratio")
    assert chart.count("<polyline") == 2
    assert chart.count('class="mark"') == 1
    assert page.chart("Bits per byte by ratio")
    assert "Ratio sweep 0.5 recommended for the chat vector" in page.words
    assert SENTENCE[1:] in page.words
    assert "<tr class=chosen><td class=number>0.5</td><td class=number>75 %</td>" in page.source
    assert "bits per byte +12.0 %" in page.words
    assert "finished up to tokenizer" in page.words, "a sweep is no stage"
    assert "0.5 ← 75% 1.500" in terminal
    assert f"sweep: {SENTENCE}" in terminal


def test_an_unfinished_sweep_shows_the_points_so_far(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(run, None)
    page, terminal = shown_by(run, capsys)
    assert "Ratio sweep running or cut short" in page.words
    assert 'class="mark"' not in page.chart("Good replies by ratio")
    assert "recommended" not in page.words
    assert "sweep, means over the new languages" in terminal


@pytest.mark.parametrize("train_it", [train, lambda run: None])
def test_a_run_without_them_has_no_such_sections(
    run: Path, train_it: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    train_it(run)
    page, terminal = shown_by(run, capsys)
    for text in (page.words.lower(), terminal.lower()):
        assert "preview" not in text
        assert "sweep" not in text
