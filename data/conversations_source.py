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
from cpt_merge.data.conversations_rows import ChatRow, chat_rows
from cpt_merge.data.conversations_store import ChatNotes, fitting
from cpt_merge.data.conversations_template import ConversationError, ConversationTemplate
from cpt_merge.data.documents import Layout, read_rows
from cpt_merge.data.hub_datasets import at_hand
from cpt_merge.data.readers.rows import BadRow, Record, Row
from cpt_merge.data.records import ConversationText
from cpt_merge.data.sources import Piece, Source

# keys of a source of text that mean nothing here
NOT_OF_CONVERSATIONS = ("field", "conversations", "whole_files", "convert", "weight", "tokens")


AnyRecord = Record | BadRow | str


@dataclass(frozen=True)
class Rendered:
    """The rows of a conversation, by group: those of a group stay together."""

    prompt: str  # see `first_prompt`
    groups: list[list[ChatRow]]


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

    def render(
        self,
        record: AnyRecord,
        where: str,
        template: ConversationTemplate,
        length: int,
        notes: ChatNotes,
    ) -> Rendered | BadRow:
        """The rows of a record, which fit sequences of a length.

        Raises `ConversationError` for a conversation that cannot be trained on.
        """
        chat = _read(record, self.format)
        if isinstance(chat, BadRow):
            return chat
        rows = fitting(where, chat_rows(template, chat), length, notes)
        return Rendered(first_prompt(chat.messages), [[row] for row in rows])


def rendered(
    source: ChatSource,
    record: AnyRecord,
    where: str,
    template: ConversationTemplate,
    length: int,
    notes: ChatNotes,
) -> Rendered | None:
    """What `source.render` makes of a record at a place; None for one that is left out.

    Raises `UserError` with the place for a record that cannot be trained on, unless the source has
    `bad_rows: skip`.
    """
    try:
        found = source.render(record, where, template, length, notes)
        reason = found.reason if isinstance(found, BadRow) else ""
    except ConversationError as error:
        reason = str(error)
    if not reason and isinstance(found, Rendered):
        return found
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
