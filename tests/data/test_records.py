"""From records to text: fields, templates, conversations."""

import pytest

from cpt_merge.data.readers.rows import BadRow
from cpt_merge.data.records import text_of


def test_a_field_is_a_name_or_a_path() -> None:
    assert text_of("text", False)({"text": "x"}) == "x"
    assert text_of("doc.text", False)({"doc": {"text": "x"}}) == "x"
    assert text_of("doc.text", False)({"doc.text": "x", "doc": {"text": "y"}}) == "x"


def test_absent_text_is_told_from_an_absent_field() -> None:
    for record in ({"text": None}, {"text": ""}):
        assert text_of("text", False)(record) == ""
    assert text_of("doc.text", False)({"doc": None}) == ""
    assert text_of("text", False)({"content": "x"}) is None
    assert text_of("doc.text", False)({"doc": {"content": "x"}}) is None


@pytest.mark.parametrize(
    ("value", "kind"),
    [(3, "a number"), (0.5, "a number"), (True, "a boolean"), ([], "a list"), ({}, "an object")],
)
@pytest.mark.parametrize("field", ["text", "{title}: {text}"])
def test_a_value_that_is_not_text_is_bad(field: str, value: object, kind: str) -> None:
    reason = f"has a field 'text' that is {kind} and not text"
    assert text_of(field, False)({"title": "x", "text": value}) == BadRow(reason)


@pytest.mark.parametrize(("doc", "kind"), [("x", "text"), ([["text", "x"]], "a list")])
def test_a_field_of_what_is_no_object_is_bad(doc: object, kind: str) -> None:
    reason = f"has {kind} instead of an object with 'text' of 'doc.text'"
    assert text_of("doc.text", False)({"doc": doc}) == BadRow(reason)


def test_a_template_joins_fields() -> None:
    make = text_of("{meta.title}\n\n{text} {{x}}", False)
    assert make.fields == ("meta.title", "text")
    assert make({"meta": {"title": "제목"}, "text": "본문"}) == "제목\n\n본문 {x}"
    assert make({"text": "본문"}) == "본문 {x}"
    assert make({"meta": {"title": " "}, "text": None}) == ""
    assert make({"content": "x"}) is None


@pytest.mark.parametrize(
    "template", ["", "{{text}}", "{}", "{text!r}", "{text:>3}", "{text", "text}"]
)
def test_a_wrong_template_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        text_of(template, False)


CONVERSATIONS: list[dict[str, object]] = [
    {"messages": [{"role": "user", "content": "물음"}, {"role": "assistant", "content": "대답"}]},
    {"conversations": [{"from": "human", "value": "물음"}, {"from": "gpt", "value": "대답"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "물음"}]},
                  {"role": "assistant", "content": None, "tool_calls": []},
                  {"role": "assistant", "content": "대답"}]},
    {"instruction": "물음", "input": "", "output": "대답"},
    {"instruction": "물음", "output": "대답", "text": "another rendering"},
    {"messages": [{"role": "user", "text": "물음"}, {"role": "assistant", "text": "대답"}]},
    {"messages": [], "conversations": [  # the columns of a table that joins two layouts
        {"role": "user", "content": "물음", "from": None, "value": None},
        {"role": None, "content": None, "from": "gpt", "value": "대답"}]},
    {"system": "물음", "conversations": [{"from": "gpt", "value": "대답"}]},
    {"system_prompt": "물음", "messages": [
        {"role": "system", "content": "물음"}, {"role": "assistant", "content": "대답"}]},
    {"instruction": "", "history": [["물음", "대답"]], "output": ""},
    {"instruction": "물음", "context": "", "response": "대답"},
]  # fmt: skip


@pytest.mark.parametrize("record", CONVERSATIONS)
def test_the_turns_of_a_conversation_are_paragraphs(record: dict[str, object]) -> None:
    assert text_of("text", True)(record) == "물음\n\n대답"


def test_alpacas_input_follows_its_instruction() -> None:
    record = {"instruction": "번역해 줘", "input": "cat", "output": "고양이"}
    assert text_of("text", True)(record) == "번역해 줘\n\ncat\n\n고양이"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": "x"}, "has a field 'messages' that is not a list of messages"),
        ({"messages": [{"content": "x"}]}, "has a message 1 without a role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "has a message 1 whose content is not text",
        ),
        ({"messages": [{"role": "user", "body": "x"}]}, "has a message 1 without content"),
        ({"instruction": 3, "output": ""}, "has a field 'instruction' that is not text"),
        ({"instruction": "x", "output": 0}, "has a field 'output' that is not text"),
        ({"instruction": "x", "answer": "y"}, "has neither 'output' nor 'response'"),
        ({"prompt": "x", "response": "y"}, "has neither 'instruction' nor 'input'"),
        ({"system": 3, "messages": []}, "has a field 'system' that is not text"),
        (
            {"history": 3, "instruction": "x", "output": "y"},
            "has a field 'history' that is not a list of questions with answers",
        ),
    ],
)
def test_a_conversation_that_cannot_be_read_is_bad(record: dict[str, object], reason: str) -> None:
    assert text_of("text", True)(record) == BadRow(reason)


def test_an_empty_conversation_is_empty_text() -> None:
    assert text_of("text", True)({"messages": []}) == ""
    assert text_of("text", True)({"messages": None}) == ""
    assert text_of("text", True)({"text": "x"}) is None
