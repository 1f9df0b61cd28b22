"""merge_report.json, the figure, and what the tracker gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.artifact import write_json
from core.progress import say
from merge import ancestry
from merge.plan import MergePlan
from merge.statistics import Statistics, Sums, by_kind, by_layer, total
from tracking.tracker import Tracker

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
    """Six digits: beyond them the sums depend on how the work was divided."""
    values = {
        "vector": sums.vector_share, "change": sums.change_share, "cosine": sums.cosine, "contained": sums.contained,
    }  # fmt: skip
    return {name: float(f"{value:.6g}") for name, value in values.items()}


def draw(layers: Mapping[str, Sums], path: Path) -> None:
    """Lengths of vector and CPT change relative to the base, and their cosine, by layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, MaxNLocator

    names, sums = list(layers), list(layers.values())
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    lengths, cosine = figure.subplots(1, 2)
    lengths.plot([part.vector_share for part in sums], "o-", ms=4, label="chat vector: |chat - base| / |base|")
    lengths.plot([part.change_share for part in sums], "s-", ms=4, label="CPT change: |cpt - base| / |base|")
    lengths.set(title="Length of the changes", ylabel="share of the base's norm")
    lengths.set_ylim(bottom=0)
    lengths.legend(frameon=False, fontsize=8)
    cosine.axhline(0, color="0.7", lw=0.8)
    cosine.plot([part.cosine for part in sums], "o-", ms=4, color="C2")
    cosine.set(title="Cosine of chat vector and CPT change", ylim=(-1, 1))
    for axes in (lengths, cosine):
        places = MaxNLocator(nbins=12, integer=True).tick_values(0, max(len(names) - 1, 1))
        shown = sorted({0, len(names) - 1, *(int(place) for place in places if 0 < place < len(names) - 1)})
        axes.xaxis.set_major_locator(FixedLocator(shown))
        axes.set_xticklabels([names[place] for place in shown], rotation=45, fontsize=8)
        axes.set_xlabel("layer")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
