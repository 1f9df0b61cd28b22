"""Sources of conversations: the files or data sets of `data/sources.py`, read as messages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from pydantic import model_validator

from cpt_merge.core.config import key
from cpt_merge.core.errors import UserError
from cpt_merge.data.conversations_messages import (
    FIELDS,
    ChatFormat,
    ChatRecord,
    first_prompt,
    read_chat,
)
from cpt_merge.data.conversations_rows import ChatRows, chat_rows
from cpt_merge.data.conversations_store import ChatNotes
from cpt_merge.data.conversations_template import ConversationError, ConversationTemplate
from cpt_merge.data.documents import Layout, read_rows
from cpt_merge.data.hub_datasets import at_hand
from cpt_merge.data.readers.rows import BadRow, Record, Row
from cpt_merge.data.records import ConversationText
from cpt_merge.data.sources import Piece, Source, source_pieces

# keys of a source of text that mean nothing here
NOT_OF_CONVERSATIONS = ("field", "conversations", "whole_files", "convert", "weight", "tokens")


AnyRecord = Record | BadRow | str


class ChatSource(Source):
    """One source of conversations in one language."""

    format: ChatFormat = key(
        "auto",
        "how records are written: `messages` (role and content), `sharegpt` (from and value) or "
        "`alpaca` (instruction, input and output); `auto` recognises it from each record",
    )

    @model_validator(mode="after")
    def _has_no_text(self) -> ChatSource:
        fields = type(self).model_fields
        given = [
            name for name in NOT_OF_CONVERSATIONS if getattr(self, name) != fields[name].default
        ]
        if given:
            raise ValueError(f"source {self.path} has conversations and {given[0]!r}; leave it out")
        return self

    @property
    def layout(self) -> Layout:
        """The fields that are read."""
        return Layout(ConversationText(FIELDS), skip_bad_rows=self.bad_rows == "skip")


@dataclass(frozen=True)
class Conversation:
    """A conversation that can be trained on."""

    where: str  # file and row
    prompt: str  # see `first_prompt`
    chat: ChatRows


def read_conversations(
    source: ChatSource, template: ConversationTemplate, notes: ChatNotes
) -> Iterator[Conversation]:
    """Every conversation of a source, in order.

    Raises `UserError` with file and row for a record that cannot be trained on, unless the source
    has `bad_rows: skip`.
    """
    for piece in source_pieces(source):
        for where, record in read_records(piece):
            found = conversation_of(record, where, source, template, notes)
            if found is not None:
                yield found


def conversation_of(
    record: AnyRecord,
    where: str,
    source: ChatSource,
    template: ConversationTemplate,
    notes: ChatNotes,
) -> Conversation | None:
    """The conversation of a record; None for one that is left out, as `read_conversations` does."""
    chat = _read(record, source.format)
    try:
        if not isinstance(chat, BadRow):
            return Conversation(where, first_prompt(chat.messages), chat_rows(template, chat))
        reason = chat.reason
    except ConversationError as error:
        reason = str(error)
    if source.bad_rows == "error":
        raise UserError(f"{where} {reason}; fix it, or set the source's `bad_rows: skip`.")
    notes.note("bad_rows", 1, f"{where}, which {reason}")
    return None


def _read(record: AnyRecord, wanted: ChatFormat) -> ChatRecord | BadRow:
    if isinstance(record, BadRow):
        return record
    return read_chat(record, wanted) if isinstance(record, dict) else BadRow("is not a record")


def read_records(piece: Piece) -> Iterator[tuple[str, AnyRecord]]:
    """(file and row, what is there) of a piece of a source."""
    for where, (_, record) in islice(_rows(piece), *piece.rows):
        yield where, record


def _rows(piece: Piece) -> Iterator[tuple[str, Row]]:
    for file in piece.files:
        path = at_hand(file)
        rows, unit = read_rows(path, piece.source.layout)
        yield from ((f"{path}: {unit} {number}", (number, record)) for number, record in rows)
