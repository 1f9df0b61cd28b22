"""From a record to the text of a document: a field, a template of fields, or a conversation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from string import Formatter
from typing import Any, Protocol

from cpt_merge.data.conversations import ALPACA, AROUND, LISTS, read_turns
from cpt_merge.data.readers.rows import BadRow, Record

_KINDS = {
    str: "text",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}
_ABSENT = object()


class TextOf(Protocol):
    """Makes the text of a document from a record."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that are read."""

    def __call__(self, record: Record) -> str | BadRow | None:
        """The text, "" for a record without any; None if the record has none of the fields."""


@dataclass(frozen=True)
class FieldText:
    """The text in a field, or in a field within fields: `text`, `doc.text`."""

    field: str

    @property
    def fields(self) -> tuple[str, ...]:
        """The field."""
        return (self.field,)

    def __call__(self, record: Record) -> str | BadRow | None:
        """See `TextOf`."""
        value = find_value(record, self.field)
        if isinstance(value, str | BadRow):
            return value
        if value is _ABSENT:
            return None
        return "" if value is None else _not_text(self.field, value)


@dataclass(frozen=True)
class TemplateText:
    """Several fields joined by a template such as "{title}\\n\\n{text}"; absent ones are empty."""

    parts: tuple[tuple[str, str], ...]  # (literal text, the field after it or "")

    @staticmethod
    def parse(template: str) -> TemplateText:
        """Raises `ValueError` that says what is wrong with a template."""
        parts = []
        for literal, name, spec, conversion in Formatter().parse(template):
            if name == "" or spec or conversion:
                raise ValueError("may contain only fields like {title}; write {{ for a brace")
            parts.append((literal, name or ""))
        if not any(name for _, name in parts):
            raise ValueError("names no field")
        return TemplateText(tuple(parts))

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the template."""
        return tuple(name for _, name in self.parts if name)

    def __call__(self, record: Record) -> str | BadRow | None:
        """See `TextOf`. White space at both ends is removed, since fields may be empty there."""
        values = [find_value(record, name) if name else "" for _, name in self.parts]
        for (_, name), value in zip(self.parts, values, strict=True):
            if isinstance(value, BadRow):
                return value
            if value is not _ABSENT and value is not None and not isinstance(value, str):
                return _not_text(name, value)
        texts = [value if isinstance(value, str) else "" for value in values]
        if all(find_value(record, name) is _ABSENT for name in self.fields):
            return None
        if not any(text.strip() for text in texts):
            return ""
        literals = (literal for literal, _ in self.parts)
        return "".join(map(str.__add__, literals, texts)).strip()


@dataclass(frozen=True)
class ConversationText:
    """The turns of a conversation as paragraphs."""

    fields: tuple[str, ...] = (*LISTS, *ALPACA, *AROUND)

    def __call__(self, record: Record) -> str | BadRow | None:
        """See `TextOf`."""
        turns = read_turns(record)
        if turns is None:
            return "" if any(name in record for name in (*LISTS, *ALPACA)) else None
        return turns if isinstance(turns, BadRow) else "\n\n".join(turn.text for turn in turns)


def text_of(field: str, conversations: bool) -> TextOf:
    """How a source's records become text. Raises `ValueError` for a wrong template."""
    if conversations:
        return ConversationText()
    if not field:
        raise ValueError("names no field")
    return TemplateText.parse(field) if "{" in field or "}" in field else FieldText(field)


def absent_fields(fields: Iterable[str], records: Iterable[Record]) -> list[str]:
    """The fields that are in none of the records."""
    absent = list(fields)
    for record in records:
        absent = [field for field in absent if find_value(record, field) is _ABSENT]
    return absent


def find_value(record: Record, path: str) -> Any:
    """The value of a field: the name as it is, or names in each other with dots between them."""
    if path in record:
        return record[path]
    value: Any = record
    for name in path.split("."):
        if value is None:
            return None  # of an object that may be absent
        if isinstance(value, BadRow):
            return value
        if not isinstance(value, dict):
            return BadRow(f"has {_kind(value)} instead of an object with {name!r} of {path!r}")
        if name not in value:
            return _ABSENT
        value = value[name]
    return value


def _not_text(field: str, value: Any) -> BadRow:
    return BadRow(f"has a field {field!r} that is {_kind(value)} and not text")


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), type(value).__name__)
