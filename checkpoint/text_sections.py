"""The parts of a config.json that describe the text decoder."""

from __future__ import annotations

from typing import Any

TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Sections of config.json that describe the text decoder of a model with more modalities."""


def resize_config(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """A config.json with another number of embedding rows, also for a nested text decoder."""
    resized = {**config, "vocab_size": rows}
    for section in TEXT_SECTIONS:
        if "vocab_size" in (config.get(section) or {}):
            resized[section] = {**config[section], "vocab_size": rows}
    return resized
