"""The report on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from cpt_merge.core.progress import console
from cpt_merge.report.view import (
    SWEEP,
    RunView,
    duration,
    metric_text,
    number,
    previewed_metrics,
    score_pivots,
    sweep_table,
)
from cpt_merge.tracking import Cell, StageLog

SHOWN_CHARACTERS = 120  # of a preview's prompt and of its reply
KEY_RESULTS = 5  # results of a stage in the overview; the page has all


def show_run(view: RunView) -> None:
    """Print an overview of a run."""
    _show_stages(view)
    _show_training(view.log("training"))
    _show_preview(view.log("training"))
    for group in view.alerts:
        earlier = f" (and {len(group.alerts) - 1:,} earlier)" if len(group.alerts) > 1 else ""
        _warn(f"alert: {group.title}: {group.alerts[0][1]}{earlier}")
    pivots = score_pivots(view.log("evaluation"))
    for metric in ("bits_per_byte", "chat"):
        if metric in pivots:
            title = ", ".join(filter(None, ("evaluation", metric, view.note("evaluation"))))
            _show_table(title, ["model", *pivots[metric].languages], pivots[metric].rows)
    _show_sweep(view)


def _show_stages(view: RunView) -> None:
    """A line for each stage; evaluation and sweep have tables of their own for their results."""
    rows = []
    for stage in view.logged:
        apart = "eval/scores" in stage.log.tables or stage.name == SWEEP
        scalars = [
            f"{name} {number(value)}"
            for name, value in ({} if apart else stage.results).items()
            if isinstance(value, int | float | str)
        ]
        more = [f"and {len(scalars) - KEY_RESULTS} more"] if len(scalars) > KEY_RESULTS else []
        state = stage.state + ", older" * (stage.name in view.older)
        results = ", ".join(scalars[:KEY_RESULTS] + more)
        rows.append([stage.name, state, duration(stage.seconds), results])
    _show_table(f"run {view.name}", ["stage", "state", "time", "results"], rows)
    for name in view.older:
        _warn(f"{name} was made {view.note(name)}; run it again")


def _show_training(log: StageLog) -> None:
    """The newest training metrics; those of a preview have a table of their own."""
    apart = {name for names in previewed_metrics(log).values() for name in names.values()}
    rows = [[name, number(value)] for name, value in log.newest.items() if name not in apart]
    if rows:
        _show_table("training, newest values", ["metric", "value"], rows)


def _show_preview(log: StageLog) -> None:
    """The newest preview of the chat model: its metrics, and its replies."""
    metrics, newest = previewed_metrics(log), log.newest
    replies = log.records("preview/replies")
    if not metrics or not replies:
        return
    step = replies[-1]["step"]
    share = metric_text({}, "", is_share=True).text
    rows = [
        [one, *(share(newest.get(names.get(one, ""))) for names in metrics.values())]
        for one in dict.fromkeys(one for names in metrics.values() for one in names)
    ]
    columns = ["language", *(name.replace("_", " ") for name in metrics)]
    _show_table(f"preview of the chat model at step {number(step)}", columns, rows)
    rows = [
        [str(row["language"]), _one_line(row["prompt"]), _one_line(row["reply"])]
        for row in replies
        if row["step"] == step
    ]
    _show_table("replies", ["language", "prompt", "reply"], rows, wrap_from=1)


def _show_sweep(view: RunView) -> None:
    """Metrics by ratio, and the recommendation."""
    sweep = sweep_table(view)
    if sweep is None:
        return
    rows = [
        [f"{row[0]} ←" if place == sweep.chosen else row[0], *row[1:]]
        for place, row in enumerate(sweep.rows)
    ]
    _show_table("sweep, means over the new languages", sweep.columns, rows)
    if sweep.sentence:
        console.print(Text(f"sweep: {sweep.sentence}"))


def _one_line(value: Cell) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"


def _warn(text: str) -> None:
    console.print(Text(text, style="yellow"))


def _show_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], wrap_from: int = -1
) -> None:
    """A table. Lines are wrapped in the columns from `wrap_from` on, by default in the last one."""
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    first = wrap_from % len(columns)
    for place, column in enumerate(columns):
        table.add_column(Text(column), overflow="fold", no_wrap=place < first)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
