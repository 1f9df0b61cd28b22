"""How many tokens a model reads at once: what its config.json and its tokenizer say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.loaded import text_section
from cpt_merge.checkpoint.reader import read_json
from cpt_merge.core.artifact import write_json

Extend = Callable[[Mapping[str, Any]], dict[str, Any]]
"""A config.json with other positions, from a model's own."""

STRETCHED = ("linear", "dynamic", "yarn")  # rope types whose positions grow by their `factor`


def positions_of(model: Mapping[str, Any]) -> int | None:
    """The most tokens of a sequence, learned or rotated, by the values of a config.json.

    None if it names no number (ALiBi, state-space models). Rotary positions that are stretched by a
    factor reach that much further; some families name the stretched number, some the original one.
    """
    text = text_section(model)
    named = text.get("max_position_embeddings")
    if not isinstance(named, int):
        return None
    reach = [named]
    for rope in rope_settings(text):
        factor = rope.get("factor")
        if rope_type(rope) in STRETCHED and isinstance(factor, int | float):
            original = rope.get("original_max_position_embeddings") or named
            reach.append(int(original * factor))
    return max(reach)


def rope_type(rope: Mapping[str, Any]) -> str:
    """How rotary positions are stretched, by any of the names for it."""
    return str(rope.get("rope_type", rope.get("type")) or "default")


def rope_settings(text: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The settings of rotary positions: one for the model, or one for each kind of layer."""
    found = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        return []
    return [found, *(one for one in found.values() if isinstance(one, Mapping))]


def raise_limit(directory: Path, config: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Let the tokenizer in `directory` encode what a model with more positions than before reads.

    `config` and `before` are the values of both config.json. A tokenizer warns of longer texts than
    its `model_max_length`, and servers cut them there.
    """
    path = directory / "tokenizer_config.json"
    positions, earlier = positions_of(config), positions_of(before)
    if positions is None or earlier is None or positions <= earlier or not path.is_file():
        return
    settings = read_json(path)
    limit = settings.get("model_max_length")
    if isinstance(limit, int | float) and limit < positions:
        write_json(path, {**settings, "model_max_length": positions})
