"""What a sweep leaves: results.json, curves.png, a table on the terminal, tables and curves in the tracker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from cpt_merge.core.artifact import write_json
from cpt_merge.core.progress import console, say
from cpt_merge.evaluation.evaluators.evaluator import Evaluator
from cpt_merge.evaluation.evaluators.language import BITS
from cpt_merge.evaluation.sweep.config import SweepConfig
from cpt_merge.evaluation.sweep.figures import draw_curves
from cpt_merge.evaluation.sweep.points import Point
from cpt_merge.evaluation.sweep.recommend import RatedPoint, Recommendation, drawn_metrics
from cpt_merge.tracking import Cell, Tracker

BEYOND = "beyond the limits"  # column of the limits that a point breaks


@dataclass
class SweepResult:
    """A sweep so far. `rated` begins with ratio 0."""

    config: SweepConfig
    languages: Sequence[str]
    evaluators: Sequence[Evaluator]
    rated: list[RatedPoint]
    recommendation: Recommendation | None = None

    @property
    def line(self) -> list[Point]:
        """The points with one ratio, by ratio."""
        found = [one.point for one in self.rated if one.point.ratio is not None]
        return sorted(found, key=lambda point: point.ratio or 0.0)

    @property
    def by_ratio(self) -> list[RatedPoint]:
        """All points: those with one ratio by ratio, then the search's."""
        return sorted(self.rated, key=lambda one: (one.point.ratio is None, one.point.ratio or 0.0))

    @property
    def recommended(self) -> Point | None:
        """The recommended point."""
        return self.recommendation.point if self.recommendation else None

    @property
    def shown(self) -> dict[str, bool]:
        """The metrics that are drawn, and whether they are shares: those of the rule, language share, bits per byte."""
        others = {
            metric.name
            for evaluator in self.evaluators
            for metric in evaluator.metrics
            if not metric.share
        }
        return {name: name not in others for name in drawn_metrics(self.config.recommend)}

    def summary(self) -> dict[str, Any]:
        """The numbers that are worth a summary."""
        quality = self.config.recommend.quality
        best = self.recommended
        values = {f"{quality}/{one.point.name}": round(one.quality, 4) for one in self.rated}
        return {**values, "recommended": best.ratios if best else None, "points": len(self.rated)}


def report(found: SweepResult, out: Path, tracker: Tracker, final: bool) -> None:
    """Write and send what there is; `final`: and draw it, and show it."""
    write_json(out / "results.json", content(found))
    _track(found, tracker)
    if not final:
        return
    best = found.recommended
    picture = draw_curves(found.line, found.shown, best.ratio if best else None, out / "curves.png")
    if picture:
        tracker.image("sweep/curves", picture)
    tracker.file("sweep-results.json", out / "results.json")
    if found.recommendation:
        tracker.summary({"sweep/recommendation": found.recommendation.sentence})
    if best and best.ratio is not None:
        tracker.summary({"sweep/recommended_ratio": best.ratio})
    console.print(table(found))
    _say_cost([one.point for one in found.rated])
    if found.recommendation:
        say(f"sweep: {found.recommendation.sentence}")


def content(found: SweepResult) -> dict[str, Any]:
    """results.json."""
    best = found.recommended
    return {
        "config": found.config.model_dump(),
        "languages": list(found.languages),
        "recommended": best.ratios if best else None,
        "why": found.recommendation.sentence
        if found.recommendation
        else "the sweep is not finished",
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
    """A table of all metrics, one of what the rule goes by, and a chart of each metric that it is about."""
    columns = ["ratio", "language", "metric", "value", "low", "high", "n"]
    rows: list[list[Cell]] = [
        [one.point.name, language, name, *asdict(estimate).values()]
        for one in found.rated
        for language, metrics in one.point.figures.items()
        for name, estimate in metrics.items()
    ]
    tracker.table("sweep/points", columns, rows)
    means: list[list[Cell]] = [
        [one.point.name, *(one.point.mean(name, found.languages) for name in found.shown), ", ".join(one.broken),
         one.point is found.recommended]
        for one in found.by_ratio
    ]  # fmt: skip
    tracker.table("sweep/ratios", ["ratio", *found.shown, BEYOND, "recommended"], means)
    for name in found.shown:
        curve: list[list[Cell]] = [
            [language, point.ratio, metrics[name].value]
            for point in found.line
            for language, metrics in point.figures.items()
            if name in metrics
        ]
        if curve:
            tracker.curves(f"sweep/{name}", ["language", "ratio", name], curve)


def show_progress(found: SweepResult) -> None:
    """A line for the newest point."""
    newest = found.rated[-1]
    of_rule = f"{found.config.recommend.quality} {newest.quality:.3f}"
    bits = newest.point.mean(BITS, found.languages)
    seconds = f"merged in {newest.point.merge_seconds:.1f} s, measured in {newest.point.evaluation_seconds:.1f} s"
    shown = [
        of_rule,
        *([f"bits per byte {bits:.3f}"] if bits is not None else []),
        *newest.broken,
        seconds,
    ]
    say(f"sweep: {newest.point.name}: {', '.join(shown)}")


def table(found: SweepResult) -> Table:
    """A row for each point: the rule's metrics, means over the new languages, and what stands against it."""
    made = Table(
        "ratio",
        title="means over " + ", ".join(found.languages),
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for name in found.shown:
        made.add_column("bits/byte" if name == BITS else name.replace("_", " "), justify="right")
    made.add_column(BEYOND)
    for one in found.by_ratio:
        values = [
            (one.point.mean(name, found.languages), share) for name, share in found.shown.items()
        ]
        cells = [
            "" if value is None else f"{value:.0%}" if share else f"{value:.3f}"
            for value, share in values
        ]
        chosen = one.point is found.recommended
        row = [one.point.name + (" ←" if chosen else ""), *cells, ", ".join(one.broken)]
        made.add_row(*map(Text, row), style="bold" if chosen else "")
    return made


def _say_cost(points: Sequence[Point]) -> None:
    merging, measuring = (
        sum(getattr(one, name) for one in points)
        for name in ("merge_seconds", "evaluation_seconds")
    )
    say(
        f"sweep: {len(points)} points; merging took {merging / len(points):.1f} s a point, "
        f"measuring {measuring / len(points):.1f} s"
    )
