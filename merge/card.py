"""README.md of a merged model: what was merged, how, from which models, under which licences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cpt_merge.merge.plan import MergePlan

LICENCE_FIELDS = ("license", "license_name", "license_link")


def model_card(plan: MergePlan, origin: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """The text of README.md."""
    licences = parents_licences(plan)
    lines = ["---", _front(licences), "---", "", "# Chat model by chat vector", ""]
    lines += [f"`{formula(plan)}`, made with cpt-merge.", ""]
    lines += ["| model | name | fingerprint | licence |", "|---|---|---|---|"]
    for label, entry in origin["inputs"].items():
        licence = (
            ", ".join(f"{name}: {value}" for name, value in licences.get(label, {}).items())
            or "not stated"
        )
        lines.append(f"| {label} | {entry['name']} | {entry['fingerprint']} | {licence} |")
    for note in plan.notes:
        lines += ["", note]
    lines += [
        "",
        "Rows of the vocabulary: "
        + ", ".join(f"{n} {role}" for role, n in results["rows"].items())
        + ".",
        "",
    ]
    settings = plan.config.model_dump(exclude_defaults=True, exclude={"ratio", "vectors"})
    if settings:
        lines += ["Settings, as in a recipe's `merge` section:", "", "```yaml"]
        lines += [yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip(), "```", ""]
    lines += [
        "Versions: "
        + ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
        + ".",
        "",
    ]
    return "\n".join([*lines, "![Norms and cosines by layer](merge_norms.svg)", ""])


def formula(plan: MergePlan) -> str:
    """`merged = cpt + 0.7 * (chat - base) + ...`."""
    if plan.config.interpolates:
        ratio = plan.config.ratio
        return f"merged = cpt + {ratio} * (chat - cpt)" + (
            ", on the arc between them (slerp)" if plan.config.method == "slerp" else ""
        )
    ratios = [plan.config.ratio, *(vector.ratio for vector in plan.config.vectors)]
    terms = []
    for number, (ratio, vector) in enumerate(zip(ratios, plan.vectors, strict=True)):
        labels = [*vector.source.models]
        of_pair = "(chat - base)" if labels == ["base", "chat"] else "vector"
        factor = f"{ratio:g}" if isinstance(ratio, float) else f"({ratio})"
        terms.append(f" + {factor} * {of_pair}" + (f" of vector {number + 1}" if number else ""))
    return "merged = cpt" + "".join(terms)


def parents_licences(plan: MergePlan) -> dict[str, dict[str, Any]]:
    """The licence fields at the head of each parent's README.md."""
    return {label: front_matter(model.directory) for label, model in plan.models().items()}


def _front(licences: Mapping[str, Mapping[str, Any]]) -> str:
    """The YAML that the hub reads.

    If all parents that state a licence state the same, its fields are carried over; otherwise the
    licences are listed.
    """
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["merge", "chat-vector"]}
    stated = [fields for fields in licences.values() if "license" in fields]
    names = {str(fields["license"]) for fields in stated}
    if len(names) == 1:
        front |= {name: value for fields in stated for name, value in fields.items()}
    elif names:
        front["license"] = "other"
        front["license_name"] = " and ".join(sorted(names))
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()


def front_matter(directory: Path) -> dict[str, Any]:
    """The licence fields at the head of a model's README.md."""
    path = directory / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        fields = yaml.safe_load(text[4 : text.index("\n---", 4)])
    except yaml.YAMLError:
        return {}
    return (
        {name: fields[name] for name in LICENCE_FIELDS if name in fields}
        if isinstance(fields, dict)
        else {}
    )
