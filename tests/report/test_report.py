"""`cpt-merge report` of the folder of a finished, a running, a failed and an unknown run."""

import json
import math
import re
import shutil
import subprocess
import time
from dataclasses import asdict
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from cpt_merge.core.artifact import StageRecord, write_json, write_record
from cpt_merge.core.errors import UserError
from cpt_merge.report import report
from cpt_merge.report.bars import Bar, BarSeries, draw_bars
from cpt_merge.report.curves import MOST_POINTS, Axis, ChartForm, Curve, draw_curves, thin
from cpt_merge.report.view import Pivot, duration, number, read_run, score_pivots
from cpt_merge.tracking import TrackingConfig, read_log, start_tracker

LOCAL = TrackingConfig(mode="disabled")
HOSTILE = "<script>alert(1)</script> [/INST] 서울"
STEP_FORM = ChartForm("step")
TRAINING = {"tokens": 6400, "sequence_length": 16, "global_batch_size": 4}  # 100 steps
SCORES = ["model", "language", "metric", "value", "low", "high", "n"]


def start(run, stage):
    sources = [{"language": "ko"}, {"language": "zh_tw"}]
    recipe = {
        "name": "demo", "models": {"base": "b&b", "chat": "c"}, "corpus": {"sources": sources}, "training": TRAINING,
    }  # fmt: skip
    settings = {"recipe": recipe, "origin": {"commit": "abc1234", "command": "cpt-merge run"}}
    return start_tracker(
        LOCAL, stage, f"demo-{stage}", "demo-abc", run / stage / "log", settings, f"id-{stage}"
    )


def finish(run, stage, results):
    write_record(
        run / stage, StageRecord(stage, "0" * 16, {}, {}, results=results), time.time() - 75
    )


def train(run, steps=60, every=2):
    """The log of a training whose step 30 was not finite."""
    training = start(run, "training")
    for step in range(0, steps, every):
        loss = math.nan if step == 30 else 9 - step / 10
        metrics = {"train/loss": loss, "train/learning_rate": 1e-4, "train/tokens": step * 64.0}
        training.log(
            {**metrics, "train/tokens_per_second": 640.0, "train/oddity": float(step)}, step=step
        )
    bits = {
        "valid/ko/bits_per_byte": 2.5,
        "valid/ko_base/bits_per_byte": 18.5,
        "valid/zh_tw/bits_per_byte": 3.5,
    }
    for step in (0, steps - 1):
        training.log({**bits, "train/tokens": step * 64.0}, step=step)
    return training


@pytest.fixture
def run(tmp_path):
    """A run whose training is not finished and whose evaluation is."""
    run = tmp_path / "runs" / "demo"
    start(run, "tokenizer").table(
        "fertility", ["language", "tokens"], [["ko", 1.25], ["zh_tw", None]]
    )
    finish(run, "tokenizer", {"new_size": 6016, "nested": {"within": 17}})
    train(run).alert("non-finite gradient", "step 30 left out")
    evaluation = start(run, "evaluation")
    figures = (("bits_per_byte", 2.1), ("chat", 0.5))
    evaluation.table(
        "eval/scores",
        SCORES,
        [[m, "ko", f, v, 0.0, 1.0, 5] for m in ("base", "merged") for f, v in figures],
    )
    columns = ["language", "prompt", "model", "reply", "stopped", "in_language", "keeps_format"]
    evaluation.table(
        "eval/samples", columns, [["ko", "수도는?", "base", HOSTILE, True, False, True]]
    )
    Figure().savefig(run / "figure.png")
    evaluation.image("eval/figure", run / "figure.png")
    finish(run, "evaluation", {"base/ko/chat": 0.5})
    return run


class Page(HTMLParser):
    """Tags, their attributes and the text of a page."""

    def __init__(self, run):
        super().__init__()
        self.source = (run / "report.html").read_text(encoding="utf-8")
        self.tags, self.pieces = [], []
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] != "style":
            self.pieces.append(data)

    @property
    def text(self):
        return " ".join(self.pieces)

    @property
    def words(self):
        return " ".join(self.text.split())

    def chart(self, label):
        """The SVG of that label."""
        return next(
            part for part in self.source.split("<svg")[1:] if f'aria-label="{label}"' in part
        ).split("</svg>")[0]


def test_terminal_and_page_of_a_running_run(run, capsys):
    report(run)
    shown = capsys.readouterr().err
    for words in ("tokenizer    finished", "training     running or cut short", "new_size 6,016", "1 min 15 s",
                  "alert: non-finite gradient: step 30 left out", "merged   2.100", "base     50%"):  # fmt: skip
        assert words in shown
    page = Page(run)
    assert HOSTILE in page.text
    assert '"b&b"' in page.text
    for words in ("training is running or cut short", "training: step 58 of 100", "left at the newest rate",
                  "embeddings not started", "Good replies, ko 50 %"):  # fmt: skip
        assert words in page.words


def test_the_page_needs_nothing_but_itself(run):
    report(run)
    page = Page(run)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "@import" not in page.source
    assert "url(" not in page.source
    sources = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    assert all(attributes["href"].startswith("#") for tag, attributes in page.tags if tag == "a")


def test_figures_are_drawn_as_the_evaluation_says_that_they_are(run):
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
        "eval/metrics", ["evaluator", "metric", "heading", "meaning", "more is better", "share"],
        [["dialogue", "turns", "turns", "turns passed", True, True], ["judge", "judge_score", "score", "of 10", False, False]],
    )  # fmt: skip
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


def assert_everything_is_shown(run, stages):
    page = Page(run)
    for stage in stages:
        log = read_log(run / stage / "log")
        names = (
            {name for row in log.rows for name in row if name != "time"}
            | set(log.tables)
            | set(log.images)
        )
        names |= {name.partition("/")[2] for name in log.summary}
        names -= {"eval/samples", "train/continuations"}  # shown by prompt
        scores = {
            f"{m}/{language}/{f}"
            for m, language, f, *_ in (
                log.tables["eval/scores"].rows if stage == "evaluation" else []
            )
        }
        for name in names:
            assert name in page.text or name.removeprefix("eval/") in scores, name
        for table in log.tables.values():
            words = {
                " ".join(cell.split())
                for row in table.rows
                for cell in row
                if isinstance(cell, str)
            }
            assert all(word in page.words for word in words)
        for said in (
            log.run["run_id"],
            *log.files,
            *(one.digest for one in log.artifacts),
            *(one["text"] for one in log.alerts),
        ):
            assert said in page.text
    return page


def test_everything_that_was_logged_is_on_the_page(run):
    report(run)
    page = assert_everything_is_shown(run, ["tokenizer", "training", "evaluation"])
    assert "nested.within 17" in page.words


def test_alerts_stand_above_all_else_those_of_one_matter_together(run, capsys):
    training = start(run, "training")
    training.resume_from(60)
    for step in range(40, 44):
        training.alert("loss spike", f"step {step}: loss 9")
    report(run)
    words = Page(run).words
    assert "loss spike , 4 times, the last: step 43: loss 9" in words
    assert "alert: loss spike: step 43: loss 9 (and 3 earlier)" in capsys.readouterr().err
    assert (
        words.index("loss spike") < words.index("non-finite gradient") < words.index("Good replies")
    )


def test_a_stage_that_failed_or_was_stopped_says_so_until_it_is_started_again(run):
    log = run / "training" / "log"
    for word, says in (
        ("failed", "training failed"),
        ("stopped", "training is stopped; its last sign"),
    ):
        training = start(run, "training")
        training.resume_from(60)
        training.alert(
            f"training {word}", "stopped by SIGTERM; the same command goes on where it can."
        )
        report(run)
        words = Page(run).words
        assert says in words[: words.index("Good replies")]
        assert "left at the newest rate" not in words
    again = json.loads((log / "run.json").read_text(encoding="utf-8"))
    write_json(log / "run.json", {**again, "started": time.time() + 1})
    report(run)
    assert "training is running or cut short" in Page(run).words


def test_that_a_stage_is_done_is_no_alert(run):
    tracker = start(run, "tokenizer")
    tracker.alert("tokenizer finished", "demo: in 75 s")
    tracker.finish()
    report(run)
    words = Page(run).words
    assert words.index("Good replies") < words.index("tokenizer finished demo: in 75 s")


def test_a_run_that_was_given_up_says_why(run):
    begun = {"job": "7", "time": 1.0, "nodes": "node[1-2]", "progress": {}}
    for attempt, verdict, reason in (
        ("7-0", "requeue", "Preempted."),
        ("7-1", "given up", "node2 ran out of memory."),
    ):
        write_json(
            run / "slurm" / attempt / "begun.json", {**begun, "time": begun["time"] + len(reason)}
        )
        write_json(
            run / "slurm" / attempt / "ended.json",
            {"verdict": verdict, "reason": reason, "progress": {}, "failure": ""},
        )
    report(run)
    words = Page(run).words
    assert "given up : node2 ran out of memory." in words[: words.index("Good replies")]
    assert "7-0" in words
    assert "Preempted." in words


def test_a_continued_stage_shows_its_rows_once_and_says_which_attempt_its_time_is(run):
    path = run / "training" / "log" / "run.json"
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "started": time.time() + 60})
    finish(run, "training", {})
    report(run)
    assert "1 min 15 s (last attempt)" in Page(run).words


def record(run, stage, key, inputs, finished="2026-11-27T10:00:00+00:00"):
    write_json(
        run / stage / "stage.json", asdict(StageRecord(stage, key, {}, inputs, 1.0, finished))
    )


@pytest.fixture
def complete(run):
    """`run`, with all stages finished, each made from the others as they are."""
    for stage in ("embeddings", "data", "merge"):
        start(run, stage)
    text = {"text ko.jsonl": "t1"}
    record(run, "tokenizer", "k1", {"base": "b1", **text})
    record(run, "embeddings", "e1", {"base": "b1", "tokenizer": "stage:k1"})
    record(run, "data", "d1", {"tokenizer": "stage:k1", **text})
    record(run, "training", "c1", {"model": "stage:e1", "data": "stage:d1"})
    record(run, "merge", "m1", {"cpt": "stage:c1", "tokenizer": "stage:k1", "base": "b1"})
    record(run, "evaluation", "v1", {"cpt": "stage:c1", "merged": "stage:m1", "base": "b1", **text})
    return run


def test_a_complete_run_is_marked_nowhere(complete, capsys):
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
    for words in ("merge        finished, older", "evaluation   finished, older", "evaluation, chat, from older inputs: training",
                  "evaluation was made from older inputs: training; run it again"):  # fmt: skip
        assert words in shown
    assert "all 6 stages are finished" not in page.words
    for words in ("Evaluation from older inputs: training", "Sample replies from older inputs: training",
                  "Merge from older inputs: training", "Tokenizer"):  # fmt: skip
        assert words in page.words
    assert "Tokenizer from older" not in page.words
    tile = page.words[page.words.index("Good replies, ko") :]
    assert "from older inputs: training" in tile[: tile.index("Training loss")]
    verdict = "finished, but made from older inputs: merge, evaluation; run them again"
    assert (verdict in page.words) == (state == "trained anew")


def test_what_was_made_of_an_older_stage_hands_that_on_and_changed_text_counts(complete):
    record(
        complete,
        "tokenizer",
        "k2",
        {"base": "b1", "text ko.jsonl": "t2"},
        "2026-11-28T10:00:00+00:00",
    )
    assert read_run(complete).older == {
        "embeddings": ["tokenizer"], "data": ["tokenizer", "text"], "training": ["tokenizer", "text"],
        "merge": ["tokenizer", "text"], "evaluation": ["tokenizer", "text"],
    }  # fmt: skip


def test_a_training_that_goes_on_with_the_same_settings_makes_nothing_older(complete):
    (complete / "training" / "stage.json").unlink()
    path = complete / "training" / "log" / "run.json"
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "settings": {"key": "c1"}})
    assert read_run(complete).older == {}


def test_a_run_that_has_hardly_begun(tmp_path):
    start(tmp_path / "demo", "tokenizer")
    report(tmp_path / "demo")
    words = Page(tmp_path / "demo").words
    assert "tokenizer is running or cut short" in words
    assert "Evaluation" not in words


def test_a_long_run_stays_a_small_page_and_its_spike_stays_visible(run, monkeypatch):
    log = run / "training" / "log" / "metrics.jsonl"
    rows = [
        {"time": 1.0, "train/step": step, "train/tokens": step * 64.0, "train/loss": 50.0 if step == 13_337 else 2.0 + step % 7,
         **{f"train/more_{place}": float(step % (7 + place)) for place in range(9)}}
        for step in range(20_000)
    ]  # fmt: skip
    log.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    report(run)
    page = Page(run)
    assert len(page.source) < 2_000_000
    assert "extremes of 20,000 rows" in page.words
    heights = [
        float(y)
        for y in re.findall(
            r",([\d.]+)", re.search(r'points="([^"]*)"', page.chart("Loss by step"))[1]
        )
    ]
    assert min(heights) < 30, "the spike reaches the top of the chart"


def test_a_model_and_a_language_have_one_colour_wherever_they_are_shown(run):
    report(run)
    page = Page(run)
    for place in (
        '<i class="key k-merged"></i>merged',
        '<rect class="k-merged"',
        '<div class="bar k-merged">',
    ):
        assert place in page.source
    assert '<polyline class="k-l0"' in page.chart("Held-out bits per byte by step")
    assert '<polyline class="k-l0 dashed"' in page.chart("Held-out bits per byte by step")
    assert '<i class="key k-l0"></i>ko' in page.source
    styles = page.source[: page.source.index("</style>")]
    used = {
        name
        for found in re.findall(r'class="([^"]*)"', page.source)
        for name in found.split()
        if name.startswith("k-")
    }
    assert all(f".{name} {{" in styles for name in used)


def test_lengths_of_documents_are_drawn_by_powers_of_two(run):
    rows = [["ko:news", 4, 0.25], ["ko:news", 6, 0.75], ["zh_tw:web", 5, 1.0]]
    start(run, "data").table(
        "data/document lengths", ["source", "log2 of tokens", "share of documents"], rows
    )
    report(run)
    chart = Page(run).chart("Document lengths by tokens, from")
    assert "<title>32\nko:news: 0 %\nzh_tw:web: 100 %</title>" in chart
    assert [f">{size}</text>" in chart for size in (8, 16, 32, 64, 128)] == [
        False,
        True,
        True,
        True,
        False,
    ]


def test_unknown_run(tmp_path, run):
    with pytest.raises(
        UserError, match=r"runs/dmo contains no stage of a run; .*; runs in .*: demo"
    ):
        report(run.parent / "dmo")
    with pytest.raises(UserError, match="contains no stage of a run"):
        report(tmp_path / "no" / "where")


def test_a_value_that_is_not_finite_leaves_a_gap_and_is_counted(run):
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, 2.0), (4.0, math.inf), (5.0, 1.0)]
    drawn = draw_curves("loss", [Curve("loss", points)], STEP_FORM)
    assert [len(found.split()) for found in re.findall(r'points="([^"]*)"', drawn)] == [2, 1, 1]
    assert not re.search(r'="nan"|nan,|,nan', drawn)
    assert drawn.count('class="odd"') == 2
    assert draw_curves("loss", [Curve("loss", [(0.0, math.nan)])], STEP_FORM) == ""
    report(run)
    assert "loss: 1 of 30 values are not finite" in Page(run).words


def test_curves_of_one_point_and_of_equal_values_are_drawn():
    for points in ([(7.0, 3.0)], [(0.0, 0.0), (9.0, 0.0)]):
        for form in (
            STEP_FORM,
            ChartForm("step", from_zero=True),
            ChartForm("step", may_be_log=True),
        ):
            assert "<circle" in draw_curves("t", [Curve("a", points)], form)


def test_the_values_of_all_lines_show_under_the_pointer():
    lines = [Curve("ko", [(0.0, 4.0), (9.0, 1.5)]), Curve("zh_tw", [(0.0, 3.0), (9.0, 1.25)])]
    assert "<title>step 9\nko: 1.5\nzh_tw: 1.25</title>" in draw_curves("t", lines, STEP_FORM)


def test_values_far_apart_get_a_logarithmic_axis():
    axis = Axis(0.8, 20, 100, 0, logarithmic=True)
    assert axis.ticks() == [1, 2, 5, 10, 20]
    assert axis.place(4) - axis.place(8) == pytest.approx(axis.place(2) - axis.place(4))


def test_bars_have_their_interval_and_value():
    drawn = draw_bars(
        "t",
        ["ko", "en"],
        [BarSeries("merged", [Bar(0.92, 0.8, 1.0), None], "k-merged")],
        share=True,
    )
    assert drawn.count("<rect") == drawn.count('class="interval"') == 1
    assert "<title>merged, ko: 92 % (80 % to 100 %)</title>" in drawn
    assert draw_bars("t", ["ko"], [BarSeries("merged", [None], "k-merged")]) == ""


def test_long_curves_keep_their_extremes_and_their_end():
    points = [(float(x), math.sin(x / 50)) for x in range(10_001)]
    points[1234], points[4321] = (1234.0, 9.0), (4321.0, math.nan)
    kept = thin(points)
    assert len(kept) <= MOST_POINTS
    assert {points[1234], points[-1]} <= set(kept)
    assert any(math.isnan(y) for _, y in kept)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert thin(points[:9]) == points[:9]


@pytest.mark.parametrize(("low", "high"), [(0, 600), (0.00001, 0.0002), (-3, 4.9e6), (3.1, 3.2)])
def test_axis_ticks_are_round_few_and_within(low, high):
    ticks = Axis(low, high, 0, 100).ticks()
    assert 3 <= len(ticks) <= 9
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


def test_numbers_and_durations():
    assert [number(value) for value in (None, True, 6016, 4915200.0, 0.70512, 2e-5, 12345.6, "x", math.nan)] == [
        "–", "yes", "6,016", "4,915,200", "0.7051", "2e-05", "12,346", "x", "not finite",
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (1.23, 42, 200, 18720)] == [
        "1.2 s",
        "42 s",
        "3 min 20 s",
        "5 h 12 min",
    ]


# what the browser made of the page: of every chart's lines and bars, how large and in which colour they are drawn
PROBE = """<script>
addEventListener("load", () => {
  const drawn = (selector) => [...document.querySelectorAll(selector)].map((element) => {
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    return {chart: element.closest("svg").getAttribute("aria-label"), width: box.width, height: box.height,
            stroke: style.stroke, fill: style.fill, right: box.right};
  });
  const found = {lines: drawn("polyline"), bars: drawn("svg rect:not(.hover)"),
                 page: getComputedStyle(document.body).backgroundColor, text: getComputedStyle(document.body).color,
                 overflow: document.documentElement.scrollWidth - innerWidth};
  document.body.innerHTML = "<pre id='found'></pre>";
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>"""


def brightness(colour):
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / (3 * 255)


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on this machine")
@pytest.mark.parametrize(("scheme", "width"), [("light", 1366), ("dark", 800)])
def test_a_browser_draws_the_curves_in_light_and_dark(run, tmp_path, scheme, width):
    report(run)
    probed = tmp_path / "probed.html"
    probed.write_text(
        (run / "report.html").read_text(encoding="utf-8").replace("</body>", PROBE + "</body>")
    )
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    flags += f" --disable-component-update --blink-settings=preferredColorScheme={1 - (scheme == 'dark')}"
    command = [
        "chromium",
        *flags.split(),
        f"--window-size={width},768",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{probed}"], capture_output=True, text=True, timeout=60
    )
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)[1])

    lines = {}  # chart -> those of its lines that are visible: a few pixels long, in a colour
    for line in found["lines"]:
        if line["width"] > 100 and line["stroke"] != "none":
            lines.setdefault(line["chart"], []).append(line["stroke"])
    assert len(lines["Loss by step"]) == 2, "one line, with a gap"
    assert len(set(lines["Held-out bits per byte by step"])) == 2, (
        "two languages; the base has the colour of its own"
    )
    assert len(lines["Held-out bits per byte by step"]) == 3
    assert lines["Learning rate by step"]
    assert not any(chart.endswith("by tokens") for chart in lines), "until it is chosen"
    visible = [bar for bar in found["bars"] if bar["height"] > 10]
    assert {bar["chart"] for bar in visible} == {"Good replies", "Bits per byte"}
    assert (brightness(found["page"]) < 0.5 < brightness(found["text"])) == (scheme == "dark")
    assert all(
        abs(brightness(stroke) - brightness(found["page"])) > 0.15
        for found_lines in lines.values()
        for stroke in found_lines
    )
    assert found["overflow"] <= 0, "nothing to scroll to sideways"
