"""Conversations in the layouts in which they are published: messages, ShareGPT, Alpaca."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cpt_merge.data.readers.rows import BadRow, Record

LISTS = ("messages", "conversations", "conversation")
ALPACA = ("instruction", "input", "output")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


@dataclass(frozen=True)
class TurnText:
    """What one side says. `role` is user, assistant, system, tool or as the record names it."""

    role: str
    text: str


def read_turns(record: Record) -> list[TurnText] | BadRow | None:
    """The turns of a record; None if it has none of the layouts.

    Turns without text (calls of tools) are left out.
    """
    for name in LISTS:
        if record.get(name) is not None:
            return _from_list(name, record[name])
    if any(record.get(name) is not None for name in ALPACA):
        return _from_alpaca(record)
    return None


def _from_list(name: str, entries: Any) -> list[TurnText] | BadRow:
    if not isinstance(entries, list):
        return BadRow(f"has a field {name!r} that is not a list of messages")
    turns = []
    for place, entry in enumerate(entries, start=1):
        role = entry.get("role", entry.get("from")) if isinstance(entry, dict) else None
        if not isinstance(role, str):
            return BadRow(f"has a message {place} without a role")
        text = _plain(entry.get("content", entry.get("value")))
        if text is None:
            return BadRow(f"has a message {place} whose content is not text")
        if text.strip():
            turns.append(TurnText(_ROLES.get(role, role), text))
    return turns


def _plain(content: Any) -> str | None:
    """The text of a message's content, which may be divided into parts; None if it has others."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        return None
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    found = [text for text in texts if isinstance(text, str)]
    return "\n\n".join(found) if len(found) == len(content) else None


def _from_alpaca(record: Record) -> list[TurnText] | BadRow:
    values = [record.get(name) or "" for name in ALPACA]
    for name, value in zip(ALPACA, values, strict=True):
        if not isinstance(value, str):
            return BadRow(f"has a field {name!r} that is not text")
    instruction, given, answer = values
    asked = "\n\n".join(part for part in (instruction, given) if part.strip())
    turns = [TurnText("user", asked), TurnText("assistant", answer)]
    return [turn for turn in turns if turn.text.strip()]
