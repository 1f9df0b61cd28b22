"""Which charts the page has, and their colours."""

import json
import re

from cpt_merge.report import report
from tests.report.runs import Page, start


def test_a_model_and_a_language_have_one_colour_wherever_they_are_shown(run):
    report(run)
    page = Page(run)
    for place in (
        '<i class="key k-merged"></i>merged',
        '<rect class="k-merged"',
        '<div class="bar k-merged">',
    ):
        assert place in page.source
    assert '<polyline class="k-l0"' in page.chart("Validation bits per byte by step")
    assert '<polyline class="k-l0 dashed"' in page.chart("Validation bits per byte by step")
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


def test_a_long_run_stays_a_small_page_and_its_spike_stays_visible(run, monkeypatch):
    log = run / "training" / "log" / "metrics.jsonl"
    rows = []
    for step in range(20_000):
        row = {"time": 1.0, "train/step": step, "train/tokens": step * 64.0}
        row["train/loss"] = 50.0 if step == 13_337 else 2.0 + step % 7
        more = {f"train/more_{place}": float(step % (7 + place)) for place in range(9)}
        rows.append({**row, **more})
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


def test_values_that_are_not_finite_are_counted(run):
    report(run)
    assert "loss: 1 of 30 values not finite" in Page(run).words
