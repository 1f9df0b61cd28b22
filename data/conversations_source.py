"""Sources of conversations: the files or data sets of `data/sources.py`, read as messages."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from pydantic import model_validator

from cpt_merge.core.config import key
from cpt_merge.core.errors import UserError
from cpt_merge.data.conversations_messages import FIELDS, ChatFormat, ChatRecord, read_chat
from cpt_merge.data.conversations_rows import ChatRows, chat_rows
from cpt_merge.data.conversations_store import ChatNotes
from cpt_merge.data.conversations_template import ConversationError, ConversationTemplate
from cpt_merge.data.documents import Layout, read_rows
from cpt_merge.data.hub_datasets import at_hand
from cpt_merge.data.readers.rows import BadRow, Row
from cpt_merge.data.records import ConversationText
from cpt_merge.data.sources import Piece, Source, source_pieces

_OF_TEXT = ("field", "conversations", "whole_files", "convert")  # keys that mean nothing here


class ChatSource(Source):
    """One source of conversations in one language."""

    format: ChatFormat = key(
        "auto",
        "how records are written: `messages` (role and content), `sharegpt` (from and value) or "
        "`alpaca` (instruction, input and output); `auto` recognises it from each record",
    )

    @model_validator(mode="after")
    def _has_no_text(self) -> ChatSource:
        given = [name for name in _OF_TEXT if name in self.model_fields_set]
        if given:
            raise ValueError(f"source {self.path} has conversations and {given[0]!r}; leave it out")
        return self

    @property
    def layout(self) -> Layout:
        """The fields that are read."""
        return Layout(ConversationText(FIELDS), skip_bad_rows=self.bad_rows == "skip")


def read_conversations(
    source: ChatSource, template: ConversationTemplate, notes: ChatNotes
) -> Iterator[tuple[str, ChatRows]]:
    """(file and row, rows) of every conversation of a source, in order.

    Raises `UserError` with file and row for a record that cannot be trained on, unless the source
    has `bad_rows: skip`.
    """
    for piece in source_pieces(source):
        for where, (_, record) in islice(_records(piece), *piece.rows):
            reason = None
            chat = _read(record, source.format)
            try:
                if isinstance(chat, BadRow):
                    reason = chat.reason
                else:
                    yield where, chat_rows(template, chat)
            except ConversationError as error:
                reason = str(error)
            if reason and source.bad_rows == "skip":
                notes.note("bad_rows", 1, f"{where}, which {reason}")
            elif reason:
                raise UserError(f"{where} {reason}; fix it, or set the source's `bad_rows: skip`.")


def _read(record: object, wanted: ChatFormat) -> ChatRecord | BadRow:
    if isinstance(record, BadRow):
        return record
    return read_chat(record, wanted) if isinstance(record, dict) else BadRow("is not a record")


def _records(piece: Piece) -> Iterator[tuple[str, Row]]:
    for file in piece.files:
        path = at_hand(file)
        rows, unit = read_rows(path, piece.source.layout)
        yield from ((f"{path}: {unit} {number}", (number, record)) for number, record in rows)
