"""README.md of a model that was trained further on conversations or on pairs of replies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cpt_merge.core.artifact import fingerprint, installed_versions, write_text
from cpt_merge.core.hub_repository import shown_name
from cpt_merge.data.store import MaskedCounts, Store
from cpt_merge.merge.card import front_matter

TITLES = {"finetune": "Fine-tuned model", "dpo": "Model after direct preference optimisation"}
CARD = "README.md"


def write_card(
    stage: str, start: Path, store: Path, results: Mapping[str, Any], model: Path
) -> None:
    """Write the card of `model`: from which model, on what, and the card of that model."""
    front = {"library_name": "transformers", **front_matter(start)}
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(), "---", ""]
    lines += [f"# {TITLES[stage]}", "", f"Stage `{stage}` of cpt-merge, "]
    lines[-1] += f"{results['steps']:,} steps from {shown_name(start)} ({fingerprint(start)})."
    lines += ["", "| source | language | tokens | of which count |", "|---|---|---|---|"]
    for source in Store.open(store).info.sources:
        counts = source.train
        assert isinstance(counts, MaskedCounts)
        cells = (source.name, source.language, f"{counts.tokens:,}", f"{counts.trained:,}")
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    lines += ["", f"Versions: {versions}.", ""]
    if (start / CARD).is_file():
        text = (start / CARD).read_text(encoding="utf-8", errors="replace")
        body = text.partition("\n---")[2] if text.startswith("---\n") else text
        lines += ["## The model that it was trained from", "", _without_pictures(body), ""]
    write_text(model / CARD, "\n".join(lines))


def _without_pictures(card: str) -> str:
    """The card one level deeper, without pictures, whose files are elsewhere."""
    kept = [line for line in card.strip().splitlines() if not line.startswith("![")]
    return "\n".join(f"##{line}" if line.startswith("# ") else line for line in kept).strip()
