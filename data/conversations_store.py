"""The store of a fine-tuning run: conversations packed into sequences before training.

Text is cut where a sequence ends, but a reply without its prompt would teach nothing, so rows of
conversations are laid into sequences here and none is divided. What is left of a sequence is a
document of its own without targets. To the training such a store is one like any other: windows of
fixed length, in an order that depends on seed and index alone, with documents isolated.
"""

from __future__ import annotations

import os
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from cpt_merge.core.progress import counted
from cpt_merge.data.conversations_rows import ChatRow, ChatRows
from cpt_merge.data.store import TRAINED_FILE, MaskedCounts, SplitWriter, Tokens

# groups that are laid into sequences together, and sequences that stay open for others
POOL, POOL_TOKENS = 4096, 2**24
_BATCH = 2**20  # tokens that are written together

Reason = Literal["bad_rows", "cut", "too_long", "dropped", "borders"]
Sizes = TypeVar("Sizes", bound=Sized)


@dataclass
class ChatNotes:
    """What became of the conversations of a source, for messages."""

    conversations: int = 0
    heldout: int = 0  # of the conversations
    rows: int = 0
    replies: int = 0
    tokens: int = 0  # of the rows
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

    def add(self, later: ChatNotes) -> None:
        """Count what became of later conversations too."""
        for name, value in vars(later).items():
            if name != "examples":
                setattr(self, name, getattr(self, name) + value)
        self.examples = later.examples | self.examples


def fitting(where: str, chat: ChatRows, length: int, notes: ChatNotes) -> list[ChatRow]:
    """The rows of a conversation, cut where a sequence of `length` tokens ends.

    A row of which no token would count is left out.
    """
    notes.conversations += 1
    notes.note("dropped", chat.dropped, where)
    notes.note("borders", chat.borders, where)
    kept = list[ChatRow]()
    for row in chat.rows:
        if not any(row.trained[:length]):
            notes.note("too_long", 1, where)
            continue
        notes.note("cut", int(len(row.ids) > length), where)
        notes.rows += 1
        notes.replies += row.replies
        notes.tokens += min(len(row.ids), length)
        kept.append(ChatRow(row.ids[:length], row.trained[:length], row.replies))
    return kept


@dataclass(frozen=True)
class Group:
    """Rows that stay together in a sequence, one after the other, each a document of its own."""

    ids: Tokens
    trained: npt.NDArray[np.bool_]
    lengths: Sequence[int]  # of the rows

    @staticmethod
    def of(rows: Sequence[ChatRow], dtype: npt.DTypeLike) -> Group:
        """A group of rows."""
        return Group(
            np.concatenate([np.asarray(row.ids, dtype) for row in rows]),
            np.concatenate([np.asarray(row.trained, np.bool_) for row in rows]),
            [len(row.ids) for row in rows],
        )

    def __len__(self) -> int:
        return len(self.ids)


def packed(groups: Iterable[Sizes], length: int) -> Iterator[list[Sizes]]:
    """Groups by sequence: of each pool, the longest first, each where it leaves the least room.

    The groups of a sequence are together at most `length` tokens long. Sequences in which there is
    room at the end of a pool stay open for the next one, so only the last ones are not full.
    """
    opened: list[tuple[int, int, list[Sizes]]] = []  # (room, number, groups), by room
    pool, tokens, number = list[Sizes](), 0, 0
    most_open = max(1, min(POOL, POOL_TOKENS // length))

    def place_pool() -> Iterator[list[Sizes]]:
        nonlocal number
        for group in sorted(pool, key=lambda one: -len(one)):
            at = bisect_left(opened, (len(group),))
            if at < len(opened):
                room, of, members = opened.pop(at)
            else:
                room, of, members = length, number, []
                number += 1
            members.append(group)
            if left := room - len(group):
                insort(opened, (left, of, members))
            else:
                yield members
        pool.clear()
        while len(opened) > most_open:  # those with the least room are full enough
            yield opened.pop(0)[2]

    for group in groups:
        pool.append(group)
        tokens += len(group)
        if len(pool) == POOL or tokens >= POOL_TOKENS:
            yield from place_pool()
            tokens = 0
    yield from place_pool()
    yield from (members for _, _, members in opened)


def write_groups(
    groups: Iterable[Group], folder: Path, dtype: npt.DTypeLike, length: int, filler: int
) -> MaskedCounts:
    """Write a split. `filler` is the token of what is left of a sequence, such as eos."""
    writer = _MaskedWriter(folder, dtype, filler)
    for members in packed(groups, length):
        writer.add(members, length - sum(map(len, members)))
    if writer.tokens:  # the label of the last position is the token after it
        writer.add([], 1)
    return writer.close(length)


class _MaskedWriter:
    """A `SplitWriter` that also writes which tokens the loss counts."""

    def __init__(self, folder: Path, dtype: npt.DTypeLike, filler: int) -> None:
        self.tokens = self.trained = 0
        self._writer, self._filler = SplitWriter(folder, dtype), filler
        self._file: IO[bytes] = open(folder / TRAINED_FILE, "wb")  # noqa: SIM115 - closed in `close`
        self._ids, self._lengths = list[Tokens](), list[int]()
        self._bits = [np.zeros(0, np.bool_)]
        self._waiting = 0  # tokens that are not written yet

    def add(self, groups: Sequence[Group], room: int) -> None:
        """Append the groups of a sequence, and fill the room that they leave."""
        filling = np.full(room, self._filler, self._writer.dtype)
        self._ids += [*(group.ids for group in groups), filling]
        self._bits += [*(group.trained for group in groups), np.zeros(room, np.bool_)]
        self._lengths += [size for group in groups for size in group.lengths]
        self._lengths += [room] if room else []
        self.trained += sum(int(group.trained.sum()) for group in groups)
        added = sum(map(len, groups)) + room
        self.tokens, self._waiting = self.tokens + added, self._waiting + added
        if self._waiting >= _BATCH:
            self._flush()

    def close(self, length: int) -> MaskedCounts:
        """Write what is left, and make everything durable."""
        self._flush()
        self._file.write(np.packbits(self._bits[0], bitorder="little").tobytes())
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        counts = self._writer.close()
        return MaskedCounts(**vars(counts), trained=self.trained, length=length)

    def _flush(self) -> None:
        lengths, bits = np.asarray(self._lengths, np.int64), np.concatenate(self._bits)
        if self._ids:
            self._writer.add(np.concatenate(self._ids), lengths, np.zeros_like(lengths))
        whole = len(bits) // 8 * 8
        self._file.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._ids, self._lengths, self._bits, self._waiting = [], [], [bits[whole:]], 0
