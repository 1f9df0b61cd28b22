"""Looks at the template and the first conversations, for what would stop or spoil a later stage."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import counted, say
from cpt_merge.data.conversations_check import checked
from cpt_merge.data.conversations_config import ConversationsConfig
from cpt_merge.data.conversations_source import (
    AnyRecord,
    ChatSource,
    read_records,
    rendered,
)
from cpt_merge.data.conversations_store import ChatNotes
from cpt_merge.data.conversations_template import ConversationTemplate
from cpt_merge.data.hub_datasets import is_at_hand
from cpt_merge.data.sources import source_files, source_pieces

HEAD_RECORDS = 50  # of the first file of a source
OTHER_RECORDS = 2  # of each other file


def check_conversations(
    config: ConversationsConfig, length: int, chat: Path, download: bool = True
) -> None:
    """Prove the chat model's template, and render the first conversations of every source.

    Raises `UserError` for what cannot be trained on. Of a hub's dataset the first file is
    downloaded, or else only what is in the cache is looked at.
    """
    found = checked(
        ConversationTemplate.read(chat, config.thinking, config.chat_template_kwargs), chat
    )
    for remark in found.remarks:
        say(f"conversations: {remark}")
    for source in config.sources:
        if download or all(map(is_at_hand, source_files(source))):
            _check_source(source, length, found.template, config.section)


def _check_source(
    source: ChatSource, length: int, template: ConversationTemplate, section: str
) -> None:
    notes, read = ChatNotes(), 0
    for where, record in _first_records(source):
        read += 1
        rendered(source, record, where, template, length, notes)
    looked_at = f"the first {counted(read, 'record')} of {source.path}"
    if not read:
        raise UserError(
            f"the source {source.path} has no conversations in its split {source.split!r}; "
            f"correct {section}.sources."
        )
    if not notes.conversations:
        raise UserError(
            f"none of {looked_at} can be trained on, such as {notes.examples['bad_rows']}; "
            f"correct them, or remove the source from {section}.sources."
        )
    if not notes.rows:
        raise UserError(
            f"no reply in {looked_at} begins within a sequence of {length:,} tokens; raise "
            f"{section}.sequence_length."
        )
    for sentence in notes.describe():
        say(f"conversations: of {looked_at}, {sentence}")


def _first_records(source: ChatSource) -> Iterator[tuple[str, AnyRecord]]:
    """(file and row, what is there) at the beginning of the first file and of others here."""
    for place, piece in enumerate(source_pieces(source)):
        if place == 0:
            yield from islice(read_records(piece), HEAD_RECORDS)
        elif is_at_hand(piece.files[0]):
            yield from islice(read_records(piece), OTHER_RECORDS)
