"""The parts of a config.json that describe the text decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Sections of config.json that describe the text decoder of a model with more modalities."""


def resize_config(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """A config.json with another number of embedding rows, also for a nested text decoder.

    A decoder's section that does not state the number gets it: otherwise the family's default would
    count. What is around the section keeps its fields.
    """
    sections = {name: resize_config(config[name], rows) for name in _sections_of(config)}
    stated = "vocab_size" in config or not sections
    return {**config, **sections, **({"vocab_size": rows} if stated else {})}


def with_values(config: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with these values, also in the sections that state one of the fields."""
    sections = {}
    for name in _sections_of(config):
        stated = {field: value for field, value in values.items() if field in config[name]}
        sections[name] = with_values(config[name], stated)
    return {**config, **sections, **values}


def _sections_of(config: Mapping[str, Any]) -> list[str]:
    return [name for name in TEXT_SECTIONS if isinstance(config.get(name), dict)]
