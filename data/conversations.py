"""Conversations in the layouts in which they are published: messages, ShareGPT, Alpaca."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cpt_merge.data.readers.rows import BadRow, Record

LISTS = ("messages", "conversations", "conversation")
_QUESTION, _GIVEN, _ANSWER = "instruction", ("input", "context"), ("output", "response")
ALPACA = (_QUESTION, *_GIVEN, *_ANSWER)
AROUND = ("system", "system_prompt", "history")  # fields of some records in either layout
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_CONTENTS = ("content", "value", "text")
_CALLS = ("tool_calls", "function_call")


@dataclass(frozen=True)
class TurnText:
    """What one side says. `role` is user, assistant, system, tool or as the record names it."""

    role: str
    text: str


def read_turns(record: Record) -> list[TurnText] | BadRow | None:
    """The turns of a record; None if it has none of the layouts.

    Turns without text (calls of tools) are left out.
    """
    lists = [name for name in LISTS if record.get(name) is not None]
    if lists:
        name = next((name for name in lists if record[name]), lists[0])
        turns = _from_list(name, record[name])
    elif any(record.get(name) is not None for name in ALPACA):
        turns = _from_alpaca(record)
    else:
        return None
    before = _before(record)
    if isinstance(turns, BadRow) or isinstance(before, BadRow):
        return turns if isinstance(turns, BadRow) else before
    said = {turn.text for turn in turns if turn.role == "system"}
    turns = [turn for turn in before if turn.text not in said] + turns
    return [turn for turn in turns if turn.text.strip()]


def _before(record: Record) -> list[TurnText] | BadRow:
    """The system prompt, and the earlier turns, that fields of their own contain."""
    turns = []
    for name in ("system", "system_prompt"):
        text = record.get(name)
        if text is not None and not isinstance(text, str):
            return _not_text(name)
        turns.append(TurnText("system", text or ""))
    for pair in _pairs(record.get("history")):
        match pair:
            case [str(question), str(answer)]:
                turns += [TurnText("user", question), TurnText("assistant", answer)]
            case _:
                return BadRow("has a field 'history' that is not a list of questions with answers")
    return turns


def _pairs(history: Any) -> list[Any]:
    return history if isinstance(history, list) else [history] if history else []


def _from_list(name: str, entries: Any) -> list[TurnText] | BadRow:
    if not isinstance(entries, list):
        return BadRow(f"has a field {name!r} that is not a list of messages")
    turns = []
    for place, entry in enumerate(entries, start=1):
        role = (entry.get("role") or entry.get("from")) if isinstance(entry, dict) else None
        if not isinstance(role, str):
            return BadRow(f"has a message {place} without a role")
        if not any(key in entry for key in (*_CONTENTS, *_CALLS)):
            return BadRow(f"has a message {place} without content")
        contents = (entry[key] for key in _CONTENTS if entry.get(key) is not None)
        text = _plain(next(contents, None))
        if text is None:
            return BadRow(f"has a message {place} whose content is not text")
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
    for needed in ((_QUESTION, "input"), _ANSWER):
        if not any(name in record for name in needed):
            return BadRow(f"has neither {' nor '.join(map(repr, needed))}")
    for name in ALPACA:
        if not isinstance(record.get(name), str | None):
            return _not_text(name)
    asked = "\n\n".join(part for part in _texts(record, (_QUESTION, *_GIVEN)) if part.strip())
    answers = [TurnText("assistant", text) for text in _texts(record, _ANSWER)]
    return [TurnText("user", asked), *answers]


def _texts(record: Record, names: tuple[str, ...]) -> list[str]:
    return [record.get(name) or "" for name in names]


def _not_text(name: str) -> BadRow:
    return BadRow(f"has a field {name!r} that is not text")
