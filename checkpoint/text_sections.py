"""The parts of a config.json that describe the text decoder."""

from __future__ import annotations

from typing import Any

TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Sections of config.json that describe the text decoder of a model with more modalities."""


def resize_config(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """A config.json with another number of embedding rows, also for a nested text decoder.

    A section that does not state the number gets it: otherwise the family's default would count.
    """
    resized = {**config, "vocab_size": rows}
    for section in TEXT_SECTIONS:
        if isinstance(config.get(section), dict):
            resized[section] = resize_config(config[section], rows)
    return resized
