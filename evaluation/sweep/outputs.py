"""What a sweep leaves: results.json, curves.png, and tables on the terminal and in the tracker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from cpt_merge.core.artifact import write_json
from cpt_merge.core.progress import console, counted, say
from cpt_merge.core.redaction import without_secrets
from cpt_merge.evaluation.evaluators.evaluator import Evaluator
from cpt_merge.evaluation.evaluators.language import BITS
from cpt_merge.evaluation.sweep.config import SweepConfig
from cpt_merge.evaluation.sweep.figures import draw_curves
from cpt_merge.evaluation.sweep.points import Point
from cpt_merge.evaluation.sweep.recommend import RatedPoint, Recommendation, drawn_metrics
from cpt_merge.tracking import Cell, Tracker

BEYOND = "beyond the limits"  # the column with the limits that a point breaks


@dataclass
class SweepResult:
    """A sweep so far. `rated` begins with ratio 0."""

    config: SweepConfig
    languages: Sequence[str]
    evaluators: Sequence[Evaluator]
    rated: list[RatedPoint]
    recommendation: Recommendation | None = None

    @property
    def by_ratio(self) -> list[RatedPoint]:
        """All points: those with one ratio by ratio, then those of the search."""
        return sorted(self.rated, key=lambda one: (one.point.ratio is None, one.point.ratio or 0.0))

    @property
    def line(self) -> list[Point]:
        """The points with one ratio, by ratio."""
        return [one.point for one in self.by_ratio if one.point.ratio is not None]

    @property
    def recommended(self) -> Point | None:
        """The recommended point."""
        return self.recommendation.point if self.recommendation else None

    @property
    def shown(self) -> dict[str, bool]:
        """The metrics that are drawn, and whether each is a share."""
        metrics = (metric for evaluator in self.evaluators for metric in evaluator.metrics)
        others = {metric.name for metric in metrics if not metric.share}
        return {name: name not in others for name in drawn_metrics(self.config.recommend)}

    def summary(self) -> dict[str, Any]:
        """The numbers for a summary of the run."""
        quality = self.config.recommend.quality
        values = {f"{quality}/{one.point.name}": round(one.quality, 4) for one in self.rated}
        best = self.recommended.ratios if self.recommended else None
        return {**values, "recommended": best, "points": len(self.rated)}


def report(found: SweepResult, out: Path, tracker: Tracker, final: bool) -> None:
    """Write and track the sweep so far; with `final`, draw and print it as well."""
    write_json(out / "results.json", content(found))
    _track(found, tracker)
    if not final:
        return
    best = found.recommended
    curves = draw_curves(found.line, found.shown, best.ratio if best else None, out / "curves.png")
    if curves:
        tracker.image("sweep/curves", curves)
    tracker.file("sweep-results.json", out / "results.json")
    if best and best.ratio is not None:
        tracker.summary({"sweep/recommended_ratio": best.ratio})
    console.print(table(found))
    merging, measuring = (
        sum(getattr(one.point, name) for one in found.rated) / len(found.rated)
        for name in ("merge_seconds", "evaluation_seconds")
    )
    say(
        f"sweep: {counted(len(found.rated), 'point')}; per point, merging took {merging:.1f} s and "
        f"measuring {measuring:.1f} s"
    )
    if found.recommendation:
        tracker.summary({"sweep/recommendation": found.recommendation.sentence})
        say(f"sweep: {found.recommendation.sentence}")


def content(found: SweepResult) -> dict[str, Any]:
    """results.json."""
    recommendation = found.recommendation
    return {
        "config": without_secrets(found.config.model_dump()),
        "languages": list(found.languages),
        "recommended": found.recommended.ratios if found.recommended else None,
        "why": recommendation.sentence if recommendation else "the sweep is not finished",
        "points": [
            {
                **asdict(one.point),
                "quality": round(one.quality, 6),
                "broken": one.broken,
                "samples": f"samples/{one.point.key}.jsonl",
            }
            for one in found.rated
        ],
    }


def _track(found: SweepResult, tracker: Tracker) -> None:
    """Send a table of all metrics, one of the rule's metrics, and a chart for each of these."""
    columns = ["ratio", "language", "metric", "value", "low", "high", "n"]
    rows: list[list[Cell]] = [
        [one.point.name, language, name, *asdict(estimate).values()]
        for one in found.rated
        for language, metrics in one.point.metrics.items()
        for name, estimate in metrics.items()
    ]
    tracker.table("sweep/points", columns, rows)
    ratios: list[list[Cell]] = []
    for one in found.by_ratio:
        means = [one.point.mean(name, found.languages) for name in found.shown]
        broken, recommended = ", ".join(one.broken), one.point is found.recommended
        ratios.append([one.point.name, *means, broken, recommended])
    tracker.table("sweep/ratios", ["ratio", *found.shown, BEYOND, "recommended"], ratios)
    for name in found.shown:
        curve: list[list[Cell]] = [
            [language, point.ratio, metrics[name].value]
            for point in found.line
            for language, metrics in point.metrics.items()
            if name in metrics
        ]
        if curve:
            tracker.curves(f"sweep/{name}", ["language", "ratio", name], curve)


def show_progress(found: SweepResult) -> None:
    """Print a line for the newest point."""
    newest = found.rated[-1]
    parts = [f"{found.config.recommend.quality} {newest.quality:.3f}"]
    bits = newest.point.mean(BITS, found.languages)
    if bits is not None:
        parts.append(f"bits per byte {bits:.3f}")
    merging, measuring = newest.point.merge_seconds, newest.point.evaluation_seconds
    parts += [*newest.broken, f"merged in {merging:.1f} s, measured in {measuring:.1f} s"]
    say(f"sweep: {newest.point.name}: {', '.join(parts)}")


def table(found: SweepResult) -> Table:
    """A row for each point: the rule's metrics, means over the new languages, and broken limits."""
    title = "means over " + ", ".join(found.languages)
    made = Table("ratio", title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in found.shown:
        made.add_column("bits/byte" if name == BITS else name.replace("_", " "), justify="right")
    made.add_column(BEYOND)
    for one in found.by_ratio:
        cells = []
        for name, share in found.shown.items():
            value = one.point.mean(name, found.languages)
            form = "{:.0%}" if share else "{:.3f}"
            cells.append("" if value is None else form.format(value))
        chosen = one.point is found.recommended
        row = [one.point.name + (" ←" if chosen else ""), *cells, ", ".join(one.broken)]
        made.add_row(*map(Text, row), style="bold" if chosen else "")
    return made
