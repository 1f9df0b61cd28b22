"""The report of a real run: everything that its stages log is on the page."""

from pathlib import Path

from cpt_merge.launcher.stages import pipeline
from cpt_merge.report import report
from tests.report.runs import assert_everything_is_shown


def test_everything_that_a_real_run_logs_is_on_its_page(finished: Path) -> None:
    report(finished)
    page = assert_everything_is_shown(finished, [stage.name for stage in pipeline(None, dpo=False)])
    assert "all 6 stages are finished" in page.words
    for chart in (
        "Loss by step", "Validation bits per byte by tokens", "Learning rate by step",
        "Tokens per character", "What each further piece brings by new pieces",
        "Length of the changes by layer", "Good replies", "Bits per byte",
    ):  # fmt: skip
        assert page.chart(chart)
