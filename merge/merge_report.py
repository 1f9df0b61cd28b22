"""merge_report.json, the figure of norms and cosines, and what is tracked."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.tensor_kinds import kind_of
from cpt_merge.core.artifact import write_json
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say
from cpt_merge.merge import ancestry, figure
from cpt_merge.merge.norms import Statistics, Sums, by_kind, by_layer, total
from cpt_merge.merge.plan import MergePlan, PlannedVector, describe_rule
from cpt_merge.tracking import Tracker

REPORT_FILE = "merge_report.json"
IN_MEMORY = "in memory"  # instead of a digest: nothing identifies a state of trained shards
SHORT_FORM = ("ratio", "rows", "chat_tokens", "overall", "warnings")
FIGURE_FILE = "merge_norms.svg"

SHARES = ("vector", "change", "cosine", "contained")
CURVES = {
    "length": {"vector": "chat vector / base", "change": "change by CPT / base"},
    "cosine": {"cosine": "between vector and change"},
}
COLUMNS = ("part", "vector / base", "cpt change / base", "cosine", "vector already in cpt")


def write(
    plan: MergePlan, statistics: list[Statistics], origin: Mapping[str, Any], directory: Path
) -> dict[str, Any]:
    """Write merge_report.json and the figure. Returns the short form for a summary."""
    rows, of_chat = plan.chat.rows, statistics[0]
    compared = [has_base(vector) for vector in plan.vectors]
    results = {
        "ratio": plan.config.ratio,
        "rows": rows.counts(),
        "chat_tokens": rows.chat_tokens,
        "overall": _shares(total(of_chat.values()), compared[0]),
        "warnings": ancestry.warnings(plan, statistics),
    }
    layers = {
        vector.label: by_layer(part) for vector, part in zip(plan.vectors, statistics, strict=True)
    }
    tensors = {
        tensor.name: {
            "rule": describe_rule(plan, tensor),
            "dtype": tensor.spec.dtype,
            "shape": tensor.spec.shape,
            **_shares(of_chat.get(tensor.name, Sums()), compared[0]),
        }
        for tensor in plan.tensors
    }
    of_vectors = {
        vector.label: {
            "overall": _shares(total(part.values()), known),
            "layers": {name: _shares(sums, known) for name, sums in layers[vector.label].items()},
            "kinds": {name: _shares(sums, known) for name, sums in by_kind(part).items()},
        }
        for vector, part, known in zip(plan.vectors, statistics, compared, strict=True)
    }
    full = {
        **results,
        **origin,
        "config": plan.config.model_dump(),
        "token_changes": asdict(plan.changes),
        "unmatched_tokens": rows.unmatched,
        "vectors": of_vectors,
        "tensors": tensors,
    }
    write_json(directory / REPORT_FILE, full)
    figure.draw(layers, directory / FIGURE_FILE)
    return {**results, "layers": of_vectors[plan.chat.label]["layers"]}


def made_in_memory(directory: Path) -> bool:
    """Whether the directory was made by the post-training hook."""
    return _read(directory).get("digest") == IN_MEMORY


def _read(directory: Path) -> dict[str, Any]:
    try:
        full: dict[str, Any] = json.loads((directory / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return full


def _is_whole(directory: Path) -> bool:
    """Whether the weights are complete."""
    try:
        Checkpoint.open(directory)
    except UserError:
        return False
    return True


def has_base(vector: PlannedVector) -> bool:
    """Whether CPT could be compared with the vector's base."""
    return "base" in vector.source.models


def read_finished(directory: Path, digest: str) -> dict[str, Any] | None:
    """The short form of the results of a finished merge; None if `directory` holds another one."""
    full = _read(directory)
    if full.get("digest") != digest or not _is_whole(directory):
        return None
    first = next(iter(full["vectors"].values()))
    return {**{name: full[name] for name in SHORT_FORM}, "layers": first["layers"]}


def log(results: Mapping[str, Any], out: Path, tracker: Tracker) -> None:
    """Print the result in two lines and track everything."""
    counts = ", ".join(f"{count:,} {role}" for role, count in results["rows"].items() if count)
    say(
        f"merge: rows {counts}"
        + (f"; from chat: {' '.join(results['chat_tokens'])}" if results["chat_tokens"] else "")
    )
    overall = results["overall"]
    change = (
        f", |cpt - base| {overall['change']:.4f}, cosine {overall['cosine']:.3f}"
        if "change" in overall
        else ""
    )
    if overall["vector"]:
        say(f"merge: |chat - base| is {overall['vector']:.4f} of |base|{change}")
    else:
        say("merge: nothing of the vector is added")
    rows = [
        [part, *(shares.get(name) for name in SHARES)] for part, shares in results["layers"].items()
    ]
    tracker.table("merge/layers", COLUMNS, rows)
    for name, shown in CURVES.items():
        values = [
            [label, int(part), shares[share]]
            for share, label in shown.items()
            for part, shares in results["layers"].items()
            if part.isdigit() and share in shares
        ]
        tracker.curves(f"merge/{name} by layer", ("curve", "layer", name), values)
    tensors = _read(out)["tensors"]
    rules = Counter((kind_of(name), tensor["rule"]) for name, tensor in tensors.items())
    counted = [(*kind_and_rule, count) for kind_and_rule, count in rules.items()]
    tracker.table("merge/rules", ("kind", "rule", "tensors"), counted)
    tracker.table("merge/rows", ("role", "rows"), list(results["rows"].items()))
    tracker.file(REPORT_FILE, out / REPORT_FILE)
    # not under the name of the table of counts: W&B keeps tables and summaries in one place
    shown_first = {f"merge/{one}": results[one] for one in ("ratio", "overall")}
    tracker.summary({"merge/row_counts": results["rows"], **shown_first})
    for warning in results["warnings"]:
        tracker.alert("merge", warning)


def warn(warnings: list[str]) -> None:
    """Print each warning."""
    for warning in warnings:
        say(f"merge: WARNING: {warning}")


def _shares(sums: Sums, compared: bool) -> dict[str, float]:
    """Rounded shares. What compares CPT with the base is left out if the base is unknown."""
    values = {"vector": sums.vector_share}
    if compared:
        values |= {"change": sums.change_share, "cosine": sums.cosine, "contained": sums.contained}
    return {name: round(value, 6) for name, value in values.items()}
