"""The table of what preparation did: a column for each source, also for two of one name."""

from cpt_merge.data.preparation.notes import Notes
from cpt_merge.data.preparation.summary import Effect, effects_of
from cpt_merge.data.store import SourceInfo, SplitCounts
from cpt_merge.report import report
from cpt_merge.report.preparation import EffectCell, effect_table
from cpt_merge.tracking import read_log
from tests.report.runs import Page, start


def source(name: str, left_out: dict[str, int]) -> SourceInfo:
    train, heldout = (
        SplitCounts(900, 9000, 1, 1),
        SplitCounts(100 - sum(left_out.values()), 1, 1, 1),
    )
    return SourceInfo(name, name[:2], name, left_out, train, heldout, None)


def log_of(run):
    first = source("ko:web", {"empty": 0, "near_duplicates": 40, "too_short": 10})
    notes = Notes()
    notes.changed["email"], notes.places["email"] = 5, 12
    found = [
        *effects_of(first, notes),
        *effects_of(source("ko:news", {"empty": 20}), Notes()),
        *effects_of(source("ko:news", {"empty": 0}), Notes()),
    ]
    rows = [effect.row() for effect in found]
    start(run, "data").table("data/preparation", Effect.columns(), rows)
    return read_log(run / "data" / "log")


def test_a_cell_for_each_step_and_source(run):
    table = effect_table(log_of(run))
    assert table is not None
    assert table.sources == ["ko:web", "ko:news", "ko:news"]
    assert [row[:2] for row in table.rows] == [
        ("email", "changed"),
        ("empty", "left out"),
        ("near duplicates", "left out"),
        ("too short", "left out"),
    ]
    cells = {row[0]: row[2] for row in table.rows}
    assert cells["email"] == [EffectCell(5, 0.005, 12, 12.5), None, None]
    assert cells["empty"] == [
        EffectCell(0, 0, None, 0), EffectCell(20, 0.02, None, 50), EffectCell(0, 0, None, 0)
    ]  # fmt: skip
    assert cells["near duplicates"][0] == EffectCell(40, 0.04, None, 100)


def test_the_page_shows_the_table_with_bars(run):
    log_of(run)
    report(run)
    page = Page(run)
    assert "What was left out and changed" in page.text
    assert "5 in 12 places 0.50 %" in page.words
    assert '<div class="bar left-out"><i style="width: 100.0%">' in page.source
    assert page.source.count('<div class="bar changed">') == 1


def test_a_run_without_the_table_has_no_card(run):
    report(run)
    assert "What was left out and changed" not in Page(run).text
