"""`cpt-merge report` of the folder of a finished, a running and a failed run."""

import json
import re
import shutil
import subprocess
import time

import pytest

from cpt_merge.core.artifact import write_json
from cpt_merge.report import report
from tests.report.conftest import HOSTILE
from tests.report.runs import Page, assert_everything_is_shown, finish, start


def test_terminal_and_page_of_a_running_run(run, capsys):
    report(run)
    shown = capsys.readouterr().err
    for words in (
        "tokenizer    finished",
        "training     running or cut short",
        "new_size 6,016",
        "1 min 15 s",
        "alert: non-finite gradient: step 30 left out",
        "merged   2.100",
        "base     50%",
    ):
        assert words in shown
    page = Page(run)
    assert HOSTILE in page.text
    assert '"b&b"' in page.text
    for words in (
        "training is running or cut short",
        "training: step 58 of 100",
        "left at the newest rate",
        "embeddings not started",
        "Good replies, ko 50 %",
    ):
        assert words in page.words


def test_the_page_is_self_contained(run):
    report(run)
    page = Page(run)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "@import" not in page.source
    assert "url(" not in page.source
    sources = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    assert all(attributes["href"].startswith("#") for tag, attributes in page.tags if tag == "a")


def test_everything_that_was_logged_is_on_the_page(run):
    report(run)
    page = assert_everything_is_shown(run, ["tokenizer", "training", "evaluation"])
    assert "nested.within 17" in page.words


def test_alerts_are_at_the_top_and_grouped_by_title(run, capsys):
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


def test_a_failed_or_stopped_stage_is_shown_so_until_it_starts_again(run):
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


def test_the_end_of_a_stage_is_no_alert(run):
    tracker = start(run, "tokenizer")
    tracker.alert("tokenizer finished", "demo: in 75 s")
    tracker.finish()
    report(run)
    words = Page(run).words
    assert words.index("Good replies") < words.index("tokenizer finished demo: in 75 s")


def test_a_run_that_was_given_up_shows_the_reason(run):
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


def test_a_continued_stage_shows_each_row_once_and_names_the_attempt_of_its_time(run):
    path = run / "training" / "log" / "run.json"
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "started": time.time() + 60})
    finish(run, "training", {})
    report(run)
    assert "1 min 15 s (last attempt)" in Page(run).words


def test_a_run_that_has_just_started_has_a_page(tmp_path):
    start(tmp_path / "demo", "tokenizer")
    report(tmp_path / "demo")
    words = Page(tmp_path / "demo").words
    assert "tokenizer is running or cut short" in words
    assert "Evaluation" not in words


# what the browser made of the page: size and colour of every chart's lines and bars
PROBE = """<script>
addEventListener("load", () => {
  const drawn = (selector) => [...document.querySelectorAll(selector)].map((element) => {
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    return {chart: element.closest("svg").getAttribute("aria-label"),
            width: box.width, height: box.height, stroke: style.stroke};
  });
  const found = {lines: drawn("polyline"), bars: drawn("svg rect:not(.hover)"),
                 page: getComputedStyle(document.body).backgroundColor,
                 text: getComputedStyle(document.body).color,
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
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update"
    flags += f" --blink-settings=preferredColorScheme={1 - (scheme == 'dark')}"
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
    assert len(set(lines["Validation bits per byte by step"])) == 2, (
        "two languages; the base has the colour of its own"
    )
    assert len(lines["Validation bits per byte by step"]) == 3
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
