"""From a record to the messages that a chat template renders.

    messages   a list of {role, content}, as OpenAI and transformers write it, with `tool_calls`,
               `reasoning_content` and a field `tools`
    sharegpt   a list of {from, value}: human, gpt, system, function_call, observation
    alpaca     fields: instruction, input, output, system, history

`data/conversations.py` reads the same layouts as plain text, for continued pretraining.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cpt_merge.data.conversations import ALPACA, AROUND, LISTS, read_turns
from cpt_merge.data.conversations_thoughts import REASONING
from cpt_merge.data.readers.rows import BadRow, Record

ChatFormat = Literal["auto", "messages", "sharegpt", "alpaca"]
Message = dict[str, Any]  # for a chat template: role, content, and what else it knows

TOOLS = "tools"
FIELDS = (*LISTS, *ALPACA, *AROUND, TOOLS)  # of the records
UNTRAINED = "weight"  # OpenAI's: the loss leaves out an assistant's message with weight 0

_ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "function_call": "assistant", "tool_call": "assistant",
    "observation": "tool", "function_response": "tool", "tool_response": "tool", "function": "tool",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")  # roles of ShareGPT whose value is a call as JSON
_CONTENTS = ("content", "value", "text")
_KEPT = ("name", "tool_call_id", UNTRAINED, *REASONING)


@dataclass(frozen=True)
class ChatRecord:
    """The messages of one conversation, and the tools that its assistant may call."""

    messages: list[Message]
    tools: list[Any] = field(default_factory=list)


def read_chat(record: Record, wanted: ChatFormat = "auto") -> ChatRecord | BadRow:
    """The conversation of a record, whose format is recognised unless it is named."""
    found = _format_of(record)
    if isinstance(found, BadRow):
        return found
    if wanted not in ("auto", found):
        return BadRow(f"is in the format {found} and not {wanted}")
    tools = _json_list(record.get(TOOLS))
    if tools is None:
        return BadRow(f"has a field {TOOLS!r} that is not a list of tools")
    messages = _alpaca(record) if found == "alpaca" else _listed(record)
    return messages if isinstance(messages, BadRow) else ChatRecord(messages, _without_none(tools))


def _format_of(record: Record) -> ChatFormat | BadRow:
    name = _list_name(record)
    if name is None:
        if any(record.get(one) is not None for one in ALPACA):
            return "alpaca"
        there = ", ".join(
            name if value is not None else f"{name}, which is null"
            for name, value in record.items()
        )
        return BadRow(
            "is no conversation: it has none of the fields 'messages', 'conversations' and "
            f"'instruction' but {there or 'none'}"
        )
    entries = record[name]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return BadRow(f"has a field {name!r} that is not a list of messages")
    if not entries:
        return BadRow(f"has a field {name!r} without messages")
    return "sharegpt" if entries[0].get("from") is not None else "messages"


def _list_name(record: Record) -> str | None:
    there = [name for name in LISTS if record.get(name) is not None]
    return next((name for name in there if record[name]), there[0] if there else None)


def _alpaca(record: Record) -> list[Message] | BadRow:
    turns = read_turns(record)
    if isinstance(turns, BadRow):
        return turns
    messages: list[Message] = [
        {"role": turn.role, "content": turn.text} for turn in turns or [] if turn.text.strip()
    ]
    asked = any(turn["role"] == "user" for turn in messages)
    if not asked:
        return BadRow("has neither instruction nor input")
    if messages[-1]["role"] != "assistant":  # `read_turns` leaves out an empty output
        messages.append({"role": "assistant", "content": ""})
    return messages


def _listed(record: Record) -> list[Message] | BadRow:
    name = _list_name(record)
    assert name is not None
    messages: list[Message] = []
    for place, entry in enumerate(record[name], start=1):
        message = _message(entry)
        if isinstance(message, BadRow):
            return BadRow(f"has a message {place} {message.reason}")
        messages.append(message)
    for field_name in ("system", "system_prompt"):
        text = record.get(field_name)
        if text is not None and not isinstance(text, str):
            return BadRow(f"has a field {field_name!r} that is not text")
        if text and text.strip() and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": text})
    return messages


def _message(entry: Record) -> Message | BadRow:
    given = entry.get("role") or entry.get("from")
    if not isinstance(given, str):
        return BadRow("without a role")
    contents = [entry[key] for key in _CONTENTS if entry.get(key) is not None]
    if not any(key in entry for key in (*_CONTENTS, "tool_calls", "function_call")):
        return BadRow("without content")
    text = _plain(contents[0] if contents else "")
    if isinstance(text, BadRow):
        return text
    message: Message = {"role": _ROLES.get(given, given), "content": text}
    for key in _KEPT:
        if entry.get(key) is not None:
            message[key] = entry[key]
    for key in REASONING:
        if not isinstance(message.get(key, ""), str):
            return BadRow(f"whose {key} is not text")
    calls = text if given in _CALLS else entry.get("tool_calls") or entry.get("function_call")
    if calls:
        found = _calls(calls)
        if found is None:
            return BadRow("whose call of a tool is not a name with arguments")
        message["tool_calls"] = found
        if given in _CALLS:
            message["content"] = ""
    return message


def _plain(content: Any) -> str | BadRow:
    """The text of a content, which may be divided into parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, BadRow):
        return BadRow(f"that {content.reason}")
    parts = content if isinstance(content, list) else [None]
    texts = [part if isinstance(part, str) else _part(part) for part in parts]
    if any(text is None for text in texts):
        return BadRow("whose content is not text")
    return "\n".join(text for text in texts if text is not None)


def _part(part: Any) -> str | None:
    text = part.get("text") if isinstance(part, dict) else None
    return text if isinstance(text, str) else None


def _calls(calls: Any) -> list[Message] | None:
    """Calls with arguments as objects, which is what templates expect; None if they are none."""
    found = _json_list(calls)
    if not found:
        return None
    made: list[Message] = []
    for call in found:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return None
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _json(arguments) if arguments.strip() else {}
        if not isinstance(arguments, dict):
            return None
        named = {"name": function["name"], "arguments": _without_none(arguments)}
        ids = {"id": call["id"]} if call.get("id") is not None else {}
        made.append({**ids, "type": "function", "function": named})
    return made


def _json_list(value: Any) -> list[Any] | None:
    """A list, which some data sets write as JSON in a text; [] if there is nothing."""
    if isinstance(value, str):
        value = _json(value) if value.strip() else []
    if value is None:
        return []
    return value if isinstance(value, list) else [value] if isinstance(value, dict) else None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _without_none(value: Any) -> Any:
    """Without the keys that Parquet adds to every record because some record has them."""
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value


def is_trained(message: Message) -> bool:
    """Whether the loss counts a message."""
    return message["role"] == "assistant" and message.get(UNTRAINED) not in (0, 0.0, False)


def first_prompt(messages: Sequence[Message]) -> str:
    """What is said before the first reply, by which conversations are held out.

    A greeting of the assistant in front of the first question is no reply.
    """
    said, asked = list[str](), False
    for message in messages:
        if message["role"] != "assistant":
            said.append(message["content"])
            asked = asked or message["role"] == "user"
        elif asked:
            break
    return "\n\n".join(said)


def roles(messages: Sequence[Message]) -> str:
    """The roles of messages, for a sentence."""
    return ", ".join(message["role"] for message in messages)
