"""Records of every layout become the same messages."""

from typing import Any

import pytest

from cpt_merge.data.conversations_messages import ChatRecord, read_chat
from cpt_merge.data.readers.rows import BadRow

ASKED = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
SYSTEM = {"role": "system", "content": "Hush."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": ASKED}, ASKED),
        ({"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]}, ASKED),
        ({"instruction": "Who?", "input": "", "output": "Me."}, ASKED),
        ({"instruction": "Who", "input": "is it?", "output": "Me."}, [{"role": "user", "content": "Who\n\nis it?"}, ASKED[1]]),
        ({"system": "Hush.", "messages": ASKED}, [SYSTEM, *ASKED]),
        ({"system": "Hush.", "messages": [SYSTEM, *ASKED]}, [SYSTEM, *ASKED]),
        (
            {"instruction": "Who?", "output": "Me.", "system": "Hush.", "history": [["a", "b"]]},
            [SYSTEM, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *ASKED],
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}, ASKED[1]]}, ASKED),
        ({"messages": ASKED, "conversations": None, "tools": None}, ASKED),
    ],
)  # fmt: skip
def test_layouts(record: dict[str, Any], messages: list[Any]) -> None:
    assert read_chat(record) == ChatRecord(messages)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASKED[0], {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]}]},
        {"messages": [ASKED[0], {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}]}]},
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}]},
        {"messages": [ASKED[0], {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}}]},
    ],
)  # fmt: skip
def test_calls_of_tools(record: dict[str, Any]) -> None:
    found = read_chat({**record, "tools": '[{"type": "function", "function": {"name": "add"}}]'})
    assert isinstance(found, ChatRecord)
    assert found.messages[1]["tool_calls"] == [CALL]
    assert found.messages[1]["content"] == ""
    assert found.tools == [{"type": "function", "function": {"name": "add"}}]


def test_results_of_tools_have_one_role() -> None:
    turns = [{"from": "human", "value": "?"}, {"from": "observation", "value": "2"}]
    found = read_chat({"conversations": turns})
    assert isinstance(found, ChatRecord)
    assert found.messages[1] == {"role": "tool", "content": "2"}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": None}, "is no conversation: it has none of the fields 'messages', 'conversations' and 'instruction' but messages, which is null"),
        ({"text": "Once."}, "is no conversation: it has none of the fields 'messages', 'conversations' and 'instruction' but text"),
        ({"messages": "Who?"}, "has a field 'messages' that is not a list of messages"),
        ({"messages": []}, "has a field 'messages' without messages"),
        ({"messages": [{"content": "Who?"}]}, "has a message 1 without a role"),
        ({"messages": [ASKED[0], {"role": "assistant"}]}, "has a message 2 without content"),
        ({"messages": [{"role": "user", "content": 3}]}, "has a message 1 whose content is not text"),
        ({"messages": [{"role": "user", "content": BadRow("contains a lone surrogate")}]}, "has a message 1 that contains a lone surrogate"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": ["add"]}]}, "has a message 1 whose call of a tool is not a name with arguments"),
        ({"messages": ASKED, "tools": "add"}, "has a field 'tools' that is not a list of tools"),
        ({"instruction": "", "output": "Me."}, "has neither instruction nor input"),
        ({"instruction": "Who?"}, "has neither 'output' nor 'response'"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_told(record: dict[str, Any], reason: str) -> None:
    assert read_chat(record) == BadRow(reason)


def test_a_named_format_refuses_others() -> None:
    assert isinstance(read_chat({"messages": ASKED}, "messages"), ChatRecord)
    found = read_chat({"messages": ASKED}, "sharegpt")
    assert found == BadRow("is in the format messages and not sharegpt")


def test_an_empty_output_stays_for_a_message_about_it() -> None:
    found = read_chat({"instruction": "Who?", "output": ""})
    assert isinstance(found, ChatRecord)
    assert found.messages[-1]["content"] == ""
