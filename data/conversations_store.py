"""The store of a fine-tuning run: conversations packed into sequences before training.

Text is cut where a sequence ends, but a reply without its prompt would teach nothing, so rows of
conversations are laid into sequences here and none is divided. What is left of a sequence is a
document of its own without targets. To the training such a store is one like any other: windows of
fixed length, in an order that depends on seed and index alone, with documents isolated.
"""

from __future__ import annotations

import os
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from cpt_merge.core.progress import counted
from cpt_merge.data.conversations_rows import ChatRow, ChatRows
from cpt_merge.data.store import TRAINED_FILE, MaskedCounts, SplitWriter

POOL = 4096  # rows that are laid into sequences together

Reason = Literal["bad_rows", "cut", "too_long", "dropped", "borders"]


@dataclass
class ChatNotes:
    """What became of the conversations of a source, for messages."""

    conversations: int = 0
    rows: int = 0
    replies: int = 0
    bad_rows: int = 0  # records that are left out
    cut: int = 0  # rows whose end is beyond the sequence
    too_long: int = 0  # rows whose first reply begins beyond the sequence, which are left out
    dropped: int = 0  # messages after the last reply
    borders: int = 0  # see `ChatRows`
    examples: dict[Reason, str] = field(default_factory=dict)  # where each occurred first

    def describe(self) -> list[str]:
        """A sentence for each thing that a user should know."""
        told: dict[Reason, tuple[int, str, str]] = {
            "bad_rows": (self.bad_rows, "record", "left out (`bad_rows: skip`)"),
            "cut": (self.cut, "row", "cut at the end of the sequence"),
            "too_long": (self.too_long, "row", "left out: no reply begins within a sequence"),
            "dropped": (self.dropped, "message", "left out: no reply follows"),
            "borders": (self.borders, "reply", "tokenised apart from the prompt"),
        }
        return [
            f"{counted(number, unit)} {what}, the first at {self.examples.get(reason, 'unknown')}"
            for reason, (number, unit, what) in told.items()
            if number
        ]

    def note(self, reason: Reason, number: int, where: str) -> None:
        """Count something that happened to a record."""
        if number:
            setattr(self, reason, getattr(self, reason) + number)
            self.examples.setdefault(reason, where)


def fitting(
    conversations: Iterable[tuple[str, ChatRows]], length: int, notes: ChatNotes
) -> Iterator[ChatRow]:
    """The rows, cut where a sequence of `length` tokens ends.

    A row of which no token would count is left out.
    """
    for where, chat in conversations:
        notes.conversations += 1
        notes.note("dropped", chat.dropped, where)
        notes.note("borders", chat.borders, where)
        for row in chat.rows:
            if not any(row.trained[:length]):
                notes.note("too_long", 1, where)
                continue
            notes.note("cut", int(len(row.ids) > length), where)
            notes.rows += 1
            notes.replies += row.replies
            yield ChatRow(row.ids[:length], row.trained[:length], row.replies)


def packed(rows: Iterable[ChatRow], length: int) -> Iterator[list[ChatRow]]:
    """Rows by sequence: of each pool, the longest first, each where it leaves the least room.

    The rows of a sequence are together at most `length` tokens long. Sequences in which there is
    room at the end of a pool stay open for the next one, so only the last ones are not full.
    """
    opened: list[tuple[int, int, list[ChatRow]]] = []  # (room, number, rows), by room
    pool: list[ChatRow] = []
    number = 0

    def place_pool() -> Iterator[list[ChatRow]]:
        nonlocal number
        for row in sorted(pool, key=lambda one: -len(one.ids)):
            at = bisect_left(opened, (len(row.ids),))
            if at < len(opened):
                room, of, members = opened.pop(at)
            else:
                room, of, members = length, number, []
                number += 1
            members.append(row)
            if left := room - len(row.ids):
                insort(opened, (left, of, members))
            else:
                yield members
        pool.clear()
        while len(opened) > POOL:  # those with the least room are full enough
            yield opened.pop(0)[2]

    for row in rows:
        pool.append(row)
        if len(pool) == POOL:
            yield from place_pool()
    yield from place_pool()
    yield from (members for _, _, members in opened)


def write_rows(
    rows: Iterable[ChatRow], folder: Path, dtype: npt.DTypeLike, length: int, filler: int
) -> MaskedCounts:
    """Write a split. `filler` is the token of what is left of a sequence, such as eos."""
    writer, bits = SplitWriter(folder, dtype), [np.zeros(0, np.bool_)]
    for members in packed(rows, length):
        room = length - sum(len(row.ids) for row in members)
        _add(writer, bits, members, [filler] * room)
    if len(bits) > 1:  # the label of the last position is the token after it
        _add(writer, bits, [], [filler])
    counts = writer.close()
    trained = np.concatenate(bits)
    _write_synced(folder / TRAINED_FILE, np.packbits(trained, bitorder="little").tobytes())
    return MaskedCounts(
        counts.documents,
        counts.tokens,
        counts.bytes,
        counts.largest,
        trained=int(trained.sum()),
        length=length,
    )


def _add(
    writer: SplitWriter,
    bits: list[npt.NDArray[np.bool_]],
    rows: Sequence[ChatRow],
    filling: list[int],
) -> None:
    documents = [row.ids for row in rows] + ([filling] if filling else [])
    tokens = np.concatenate([np.asarray(ids, writer.dtype) for ids in documents])
    lengths = np.asarray([len(ids) for ids in documents], np.int64)
    writer.add(tokens, lengths, np.zeros(len(documents), np.int64))
    bits += [np.asarray(row.trained, np.bool_) for row in rows]
    bits.append(np.zeros(len(filling), np.bool_))


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
