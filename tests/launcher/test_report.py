"""`cpt-merge report`: what it makes of the folder of a finished, a running and an unknown run."""

import math
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from core.artifact import StageRecord, write_record
from core.errors import UserError
from launcher.report import duration, number, report
from launcher.report_curves import MOST_POINTS, Axis, Line, draw_chart, thin
from tracking import TrackingConfig, start_tracker

LOCAL = TrackingConfig(carrier="none")
HOSTILE = "<script>alert(1)</script> [/INST] 서울"


def start(run, stage):
    settings = {"recipe": {"name": "demo", "models": {"base": "b&b"}}}
    return start_tracker(LOCAL, stage, f"demo-{stage}", "demo-abc", run / stage / "log", settings, f"id-{stage}")


def finish(run, stage, results):
    write_record(run / stage, StageRecord(stage, "0" * 16, {}, {}, results=results), time.time() - 75)


@pytest.fixture
def run(tmp_path):
    """A run whose training is not finished and whose evaluation is."""
    run = tmp_path / "runs" / "demo"
    start(run, "tokenizer").table("fertility", ["language", "tokens"], [["ko", 1.25], ["zh_tw", None]])
    finish(run, "tokenizer", {"new_size": 6016, "nested": {"left": "out"}})
    training = start(run, "training")
    for step in range(0, 60, 2):
        loss = math.nan if step == 30 else 9 - step / 10
        training.log({"train/loss": loss, "train/learning_rate": 1e-4, "train/tokens": step * 64.0}, step=step)
    training.log({"valid/ko/bits_per_byte": 2.5, "valid/zh_tw/bits_per_byte": 3.5, "train/tokens": 3776.0}, step=59)
    training.alert("non-finite gradient", "step 30 left out")
    evaluation = start(run, "evaluation")
    columns = ["model", "language", "figure", "value", "low", "high", "n"]
    scores = [
        [m, "ko", f, v, 0.0, 1.0, 5] for m in ("base", "merged") for f, v in (("bits_per_byte", 2.1), ("chat", 0.5))
    ]
    evaluation.table("eval/scores", columns, scores)
    columns = ["language", "prompt", "model", "reply", "stopped", "in_language", "keeps_format"]
    evaluation.table("eval/samples", columns, [["ko", "수도는?", "base", HOSTILE, True, False, True]])
    Figure().savefig(run / "figure.png")
    evaluation.image("eval/figure", run / "figure.png")
    finish(run, "evaluation", {"base/ko/chat": 0.5})
    return run


class Page(HTMLParser):
    """Tags, their attributes and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_terminal_and_page_of_a_running_run(run, capsys):
    report(run)
    shown = capsys.readouterr().err
    for words in ("tokenizer    finished", "training     running or cut short", "new_size 6,016", "1 min 15 s",
                  "alert: non-finite gradient: step 30 left out", "merged   2.100", "base     50%"):  # fmt: skip
        assert words in shown
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert HOSTILE in page.text
    assert "running or cut short" in page.text
    assert '"b&b"' in page.text
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags
    assert "link" not in tags
    assert tags.count("svg") == 2 * 3, "loss, bits per byte and learning rate, each by steps and by tokens"
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")


def test_unknown_run(tmp_path, run):
    with pytest.raises(UserError, match=r"runs/dmo holds no stage of a run; .*; runs there: demo"):
        report(run.parent / "dmo")
    with pytest.raises(UserError, match="holds no stage of a run"):
        report(tmp_path / "no" / "where")


def test_a_value_that_is_not_finite_leaves_a_gap():
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, 2.0), (4.0, math.inf), (5.0, 1.0)]
    drawn = draw_chart("loss", [Line("loss", points)], "step")
    assert [len(found.split()) for found in re.findall(r'points="([^"]*)"', drawn)] == [2, 1, 1]
    assert "nan" not in drawn
    assert draw_chart("loss", [Line("loss", [(0.0, math.nan)])], "step") == ""


def test_curves_of_one_point_and_of_equal_values_are_drawn():
    for points in ([(7.0, 3.0)], [(0.0, 0.0), (9.0, 0.0)]):
        assert "<circle" in draw_chart("t", [Line("a", points)], "step")


def test_long_curves_are_thinned_and_keep_their_end():
    points = [(float(x), 0.0) for x in range(10_001)]
    assert len(thin(points)) <= MOST_POINTS
    assert thin(points)[-1] == points[-1]
    assert thin(points[:9]) == points[:9]


@pytest.mark.parametrize(("low", "high"), [(0, 600), (0.00001, 0.0002), (-3, 4.9e6), (3.1, 3.2)])
def test_axis_ticks_are_round_few_and_within(low, high):
    ticks = Axis(low, high, 0, 100).ticks()
    assert 3 <= len(ticks) <= 9
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_numbers_and_durations():
    assert [number(value) for value in (None, True, 6016, 4915200.0, 0.70512, 2e-5, 12345.6, "x")] == [
        "–", "yes", "6,016", "4,915,200", "0.7051", "2e-05", "12,346", "x",
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (1.23, 42, 200, 18720)] == ["1.2 s", "42 s", "3 min 20 s", "5 h 12 min"]


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on this machine")
def test_a_browser_draws_the_curves(run, tmp_path):
    report(run)
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    command = ["chromium", *flags.split(), "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}"]
    page = subprocess.run(
        [*command, "--dump-dom", f"file://{run / 'report.html'}"], capture_output=True, text=True, timeout=60
    ).stdout
    assert page.count("<polyline") >= 6
    subprocess.run([*command, f"--screenshot={tmp_path / 'shot.png'}", f"file://{run / 'report.html'}"], timeout=60)
    assert (tmp_path / "shot.png").stat().st_size > 10_000
