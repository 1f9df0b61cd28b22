"""merge_report.json, the figure, and what the tracker gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.artifact import write_json
from core.progress import say
from merge import ancestry
from merge.plan import MergePlan
from merge.statistics import Statistics, Sums, by_kind, by_layer, total
from tracking.tracker import Tracker

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPORT_FILE = "merge_report.json"
FIGURE_FILE = "merge_norms.png"

COLUMNS = ("part", "vector / base", "cpt change / base", "cosine", "vector already in cpt")


def write(plan: MergePlan, statistics: Statistics, origin: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Write merge_report.json and the figure. Returns its short form: what a summary shows."""
    rows = plan.rows
    results = {
        "ratio": plan.config.ratio,
        "rows": rows.counts(),
        "chat_tokens": rows.chat_tokens,
        "overall": _shares(total(statistics.values())),
        "warnings": ancestry.warnings(statistics) if statistics else [],
    }
    layers = by_layer(statistics)
    tensors = {
        tensor.name: {
            "treatment": asdict(tensor.treatment) if tensor.treatment else "copied",
            "dtype": tensor.spec.dtype,
            "shape": tensor.spec.shape,
            **_shares(statistics.get(tensor.name, Sums())),
        }
        for tensor in plan.tensors
    }
    full = {
        **results,
        **origin,
        "config": plan.config.model_dump(),
        "unmatched_tokens": rows.unmatched,
        "layers": {name: _shares(sums) for name, sums in layers.items()},
        "kinds": {name: _shares(sums) for name, sums in by_kind(statistics).items()},
        "tensors": tensors,
    }
    write_json(directory / REPORT_FILE, full)
    draw(layers, directory / FIGURE_FILE)
    return {**results, "layers": full["layers"]}


def log(results: Mapping[str, Any], out: Path, tracker: Tracker) -> None:
    """Say the result in two lines and give everything to the tracker."""
    counts = ", ".join(f"{count:,} {role}" for role, count in results["rows"].items() if count)
    say(
        f"merge: rows {counts}" + (f"; from chat: {' '.join(results['chat_tokens'])}" if results["chat_tokens"] else "")
    )
    overall = results["overall"]
    say(
        f"merge: |chat - base| is {overall['vector']:.4f} of |base|, |cpt - base| {overall['change']:.4f}, "
        f"cosine {overall['cosine']:.3f}"
    )
    rows = [[part, *shares.values()] for part, shares in results["layers"].items()]
    tracker.table("merge/layers", COLUMNS, rows)
    tracker.image("merge/norms", out / FIGURE_FILE)
    tracker.summary({f"merge/{name}": results[name] for name in ("ratio", "rows", "overall")})
    for warning in results["warnings"]:
        tracker.alert("merge", warning)


def warn(warnings: list[str]) -> None:
    """Say each warning."""
    for warning in warnings:
        say(f"merge: WARNING: {warning}")


def _shares(sums: Sums) -> dict[str, float]:
    """Rounded: the last digits depend on how the work was divided."""
    values = {
        "vector": sums.vector_share, "change": sums.change_share, "cosine": sums.cosine, "contained": sums.contained,
    }  # fmt: skip
    return {name: round(value, 6) for name, value in values.items()}


def draw(layers: Mapping[str, Sums], path: Path) -> None:
    """Lengths of vector and CPT change relative to the base, and their cosine: layers as a line, the rest beside it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    lengths, cosine = figure.subplots(1, 2)
    vector, change = "chat vector, |chat - base| / |base|", "CPT's change, |cpt - base| / |base|"
    _draw_parts(lengths, {name: sums.vector_share for name, sums in layers.items()}, "C0", vector)
    _draw_parts(lengths, {name: sums.change_share for name, sums in layers.items()}, "C1", change)
    lengths.set_title("Length of the two changes", fontsize=10)
    lengths.set_ylim(0, 1.25 * lengths.get_ylim()[1])  # room for the legend
    lengths.legend(frameon=False, fontsize=8, loc="upper center", ncols=1)
    cosines = {name: sums.cosine for name, sums in layers.items()}
    largest = max([0.2, *(abs(value) for value in cosines.values())])
    cosine.axhline(0, color="0.7", lw=0.8)
    _draw_parts(cosine, cosines, "C2", "")
    cosine.set_title("Cosine between them", fontsize=10)
    cosine.set_ylim(-1.1 * largest, 1.1 * largest)
    figure.savefig(path, dpi=150)


def _draw_parts(axes: Axes, values: Mapping[str, float], color: str, label: str) -> None:
    """One value for each layer and for what lies outside them (embed before, norm and head after)."""
    layers = [name for name in values if name.isdigit()]
    gap = max(1.0, len(layers) / 8)
    places = {name: float(number) for number, name in enumerate(layers)}
    outside = [name for name in values if name not in places]
    after = [name for name in outside if name != "embed"]
    places |= {"embed": -gap} if "embed" in outside else {}
    places |= {name: len(layers) - 1 + gap * (number + 1) for number, name in enumerate(after)}
    axes.plot(
        [places[name] for name in layers], [values[name] for name in layers], "o-", ms=3, color=color, label=label
    )
    axes.plot([places[name] for name in outside], [values[name] for name in outside], "D", ms=5, color=color)
    shown = [*outside, *layers[:: max(len(layers) // 8, 1)]]
    axes.set_xticks([places[name] for name in shown], shown, fontsize=8)
    axes.set_xlabel("layer")
    axes.spines[["top", "right"]].set_visible(False)
