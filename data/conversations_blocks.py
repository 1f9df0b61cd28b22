"""Conversations on their way into a store: blocks of rows, which several processes make.

    BLOCKS/0000-000000.npz   block 0 of piece 0: tokens, lengths and mask of its rows by split, and
                             what became of its records
    BLOCKS/0000.json         the number of blocks of piece 0, once a process has read it to its end

A file takes its name when all of it is on disk, so what a killed process left is used again.
Which conversations are in a block depends on the conversations alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cpt_merge.core.artifact import write_json
from cpt_merge.data.conversations_store import ChatNotes, Group
from cpt_merge.data.store import StoreSplit

# a block ends with the record that reaches one of these
BLOCK_RECORDS, BLOCK_BYTES = 512, 2**20


@dataclass
class ChatBlock:
    """The rows of successive records, by split, and what became of the records."""

    notes: ChatNotes = field(default_factory=ChatNotes)
    groups: dict[StoreSplit, list[Group]] = field(default_factory=dict)

    def add(self, split: StoreSplit, groups: Iterable[Group]) -> None:
        """Append groups of rows to a split."""
        self.groups.setdefault(split, []).extend(groups)


@dataclass(frozen=True)
class Blocks:
    """The blocks in a directory."""

    directory: Path

    def has(self, piece: int, block: int) -> bool:
        """Whether a block is there."""
        return self._path(piece, block).is_file()

    def finished(self) -> int:
        """How many blocks are there."""
        return len(list(self.directory.glob("*.npz")))

    def count(self, piece: int) -> int | None:
        """How many blocks a piece has; None if no process has read it to its end."""
        path = self._end(piece)
        return int(json.loads(path.read_text())["blocks"]) if path.is_file() else None

    def end(self, piece: int, blocks: int) -> None:
        """Note how many blocks a piece has."""
        write_json(self._end(piece), {"blocks": blocks})

    def write(self, piece: int, block: int, content: ChatBlock) -> None:
        """Write a block durably."""
        path = self._path(piece, block)
        temporary = path.with_suffix(".tmp")
        arrays: dict[str, Any] = {"notes": np.asarray(json.dumps(asdict(content.notes)))}
        for split, groups in content.groups.items():
            if groups:
                arrays[f"{split}-ids"] = np.concatenate([group.ids for group in groups])
                arrays[f"{split}-trained"] = np.concatenate([group.trained for group in groups])
                arrays[f"{split}-lengths"] = np.asarray([group.lengths for group in groups])
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def notes(self, pieces: Iterable[int]) -> ChatNotes:
        """What became of the records of complete pieces."""
        found = ChatNotes()
        for path in self._of(pieces):
            with np.load(path) as block:
                found.add(ChatNotes(**json.loads(str(block["notes"]))))
        return found

    def groups(self, pieces: Iterable[int], split: StoreSplit) -> Iterator[Group]:
        """The groups of a split of complete pieces, in order."""
        for path in self._of(pieces):
            with np.load(path) as block:
                if f"{split}-ids" not in block:
                    continue
                ids, trained, lengths = (
                    block[f"{split}-{name}"] for name in ("ids", "trained", "lengths")
                )
            ends = np.cumsum(lengths.sum(axis=1))
            for end, of_rows in zip(ends.tolist(), lengths.tolist(), strict=True):
                here = slice(end - sum(of_rows), end)
                # copies, since a group that waits for its sequence must not keep its block
                yield Group(ids[here].copy(), trained[here].copy(), of_rows)

    def _of(self, pieces: Iterable[int]) -> Iterator[Path]:
        for piece in pieces:
            count = self.count(piece)
            assert count is not None
            yield from (self._path(piece, block) for block in range(count))

    def _path(self, piece: int, block: int) -> Path:
        return self.directory / f"{piece:04d}-{block:06d}.npz"

    def _end(self, piece: int) -> Path:
        return self.directory / f"{piece:04d}.json"
