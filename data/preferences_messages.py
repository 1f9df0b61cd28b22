"""From a record to a preference pair: two replies to the same prompt.

prompt, chosen, rejected        texts, or lists of messages; `question` and `instruction` too
chosen, rejected                whole conversations with the same prompt, as lists of messages
conversations, chosen, rejected ShareGPT: the prompt, and a message each
chosen, rejected                texts with `Human:` and `Assistant:` (Anthropic's HH)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import regex

from cpt_merge.data.conversations import LISTS
from cpt_merge.data.conversations_messages import TOOLS, UNTRAINED, ChatRecord, Message, read_chat
from cpt_merge.data.readers.rows import BadRow, Record

SIDES = (("chosen", "chosen_response"), ("rejected", "rejected_response"))
PROMPTS = ("prompt", "question", "instruction", "input")
SYSTEMS = ("system", "system_prompt")
PAIR_FIELDS = (*(name for side in SIDES for name in side), *PROMPTS, *LISTS, *SYSTEMS, TOOLS)

_HH_TURN = regex.compile(r"(?:\A|\n\n)\s*(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class PairRecord:
    """Two conversations that differ in their last message, which alone is trained on."""

    chosen: ChatRecord
    rejected: ChatRecord


def read_pair(record: Record) -> PairRecord | BadRow:
    """The pair of a record."""
    sides = list[ChatRecord]()
    for names in SIDES:
        value = next((record[name] for name in names if record.get(name) is not None), None)
        if value is None:
            there = ", ".join(record) or "none"
            return BadRow(f"is no preference pair: it has no field {names[0]!r} but {there}")
        side = _side(record, value)
        if isinstance(side, BadRow):
            return BadRow(f"has a field {names[0]!r} that {side.reason}")
        sides.append(side)
    chosen, rejected = (side.messages for side in sides)
    if chosen[:-1] != rejected[:-1]:
        return BadRow("has prompts of 'chosen' and 'rejected' that differ")
    if chosen == rejected:
        return BadRow("has the same reply as 'chosen' and as 'rejected'")
    return PairRecord(*sides)


def _side(record: Record, value: Any) -> ChatRecord | BadRow:
    """The conversation that ends with one of the replies."""
    said = _messages(value, "assistant")
    if isinstance(said, BadRow):
        return said
    whole = said if said[0]["role"] != "assistant" or len(said) > 1 else _with_prompt(record, said)
    if isinstance(whole, BadRow):
        return whole
    system = next((record[name] for name in SYSTEMS if record.get(name)), None)
    found = read_chat({"messages": whole, "system": system, TOOLS: record.get(TOOLS)})
    if isinstance(found, BadRow):
        return found
    *before, last = found.messages
    if last["role"] != "assistant" or not before:
        return BadRow("does not end with a reply of the assistant to a prompt")
    untrained = [{**one, UNTRAINED: 0} if one["role"] == "assistant" else one for one in before]
    return ChatRecord([*untrained, {**last, UNTRAINED: 1}], found.tools)


def _with_prompt(record: Record, reply: list[Message]) -> list[Message] | BadRow:
    names = [name for name in (*PROMPTS, *LISTS) if record.get(name)]
    if not names:
        return BadRow(f"is a reply alone, and the record has no {PROMPTS[0]!r}")
    prompt = _messages(record[names[0]], "user")
    if isinstance(prompt, BadRow):
        return BadRow(f"follows a {names[0]!r} that {prompt.reason}")
    return [*prompt, *reply]


def _messages(value: Any, role: str) -> list[Message] | BadRow:
    """The messages of a text, of a message or of a list; `role` is that of a text alone."""
    if isinstance(value, str):
        turns = _HH_TURN.split(value)
        if len(turns) == 1 or turns[0].strip():
            return [{"role": role, "content": value}]
        pairs = zip(turns[1::2], turns[2::2], strict=True)
        return [{"role": _HH_ROLES[who], "content": text.strip()} for who, text in pairs]
    found = read_chat({"messages": [value] if isinstance(value, dict) else value})
    return found if isinstance(found, BadRow) else found.messages
