"""Bars as SVG, with intervals and values."""

from cpt_merge.report.bars import Bar, BarSeries, draw_bars


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
