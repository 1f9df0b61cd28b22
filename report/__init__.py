"""The report of a run: read from disk (`view`), printed, and written as one HTML page."""

from __future__ import annotations

import time
from pathlib import Path

from cpt_merge.core.artifact import write_text
from cpt_merge.core.progress import say
from cpt_merge.report.page import render_page
from cpt_merge.report.terminal import show_run
from cpt_merge.report.view import RunView, read_run

PAGE = "report.html"


def report(run: Path) -> None:
    """Print an overview of a run and write `report.html` into its folder.

    Raises `UserError` for an unknown run.
    """
    view = read_run(run)
    show_run(view)
    write_page(view)


def write_page(view: RunView) -> None:
    """Write `report.html` into the folder of a run."""
    page = view.directory / PAGE
    write_text(page, render_page(view, time.time()))
    say(f"report: {page}")
