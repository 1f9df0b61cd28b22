"""Tokenised blocks on their way into a store: parts that any process writes and reads.

    OUT.parts/unfinished          the marker of `core.artifact.Staging`: the digest of the store
    OUT.parts/part-*/blocks.npy   int64 [blocks, 7]: piece, block, documents left out for each
                                  reason, documents of each split
    OUT.parts/part-*/ends.npy     int64 [ends, 2]: a piece that was read to its end, its blocks
    OUT.parts/part-*/SPLIT-*.npy  the blocks' documents one after the other: tokens, lengths, bytes,
                                  hashes

A part takes its name when all of it is on disk. Which process made a block does not matter: blocks
are joined by their numbers (`data/join.py`).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cpt_merge.core.artifact import Staging
from cpt_merge.data.store import SPLITS, Integers, StoreSplit, Tokens

PART_BYTES = 64_000_000  # of tokens in one part
REASONS = ("bad_rows", "empty")  # why a document of a block is left out

_FIRST_SPLIT = 2 + len(REASONS)  # column of `blocks`

Place = tuple[int, int]  # (piece, block)


@dataclass(frozen=True)
class Encoded:
    """Documents one after the other. `hashes` [documents, 2]: 128 bits of each document's text."""

    tokens: Tokens
    lengths: Integers
    bytes: Integers
    hashes: npt.NDArray[np.uint64]


@dataclass(frozen=True)
class TokenBlock:
    """Successive documents of a piece, tokenised and divided into splits.

    `left_out` is the number of the others for each of `REASONS`.
    """

    place: Place
    left_out: tuple[int, ...]
    splits: dict[StoreSplit, Encoded]


class PartWriter:
    """Collects the blocks of one process and writes them as parts."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._blocks: list[TokenBlock] = []
        self._ends: list[Place] = []
        self._size = 0

    def add(self, block: TokenBlock) -> None:
        """Take a block, and write a part if there is enough."""
        self._blocks.append(block)
        self._size += sum(encoded.tokens.nbytes for encoded in block.splits.values())
        if self._size >= PART_BYTES:
            self.flush()

    def end(self, piece: int, blocks: int) -> None:
        """Note that a piece was read to its end."""
        self._ends.append((piece, blocks))

    def flush(self) -> None:
        """Write what was collected."""
        if not self._blocks and not self._ends:
            return
        name = secrets.token_hex(8)
        rows = []
        for block in self._blocks:
            counts = [len(block.splits[s].lengths) if s in block.splits else 0 for s in SPLITS]
            rows.append([*block.place, *block.left_out, *counts])
        with Staging(self.directory / f"part-{name}").filling() as part:
            np.save(
                part / "blocks.npy",
                np.asarray(rows, np.int64).reshape(-1, _FIRST_SPLIT + len(SPLITS)),
            )
            np.save(part / "ends.npy", np.asarray(self._ends, np.int64).reshape(-1, 2))
            for split in SPLITS:
                encoded = [block.splits[split] for block in self._blocks if split in block.splits]
                for field in fields(Encoded) if encoded else ():
                    values = np.concatenate([getattr(one, field.name) for one in encoded])
                    np.save(part / f"{split}-{field.name}.npy", values)
        self._blocks, self._ends, self._size = [], [], 0


class StoredPart:
    """A part on disk; its arrays are memory-mapped at the first use."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.blocks: Integers = np.load(directory / "blocks.npy")
        self.ends: Integers = np.load(directory / "ends.npy")
        self._documents = np.concatenate(
            [np.zeros((1, len(SPLITS)), np.int64), np.cumsum(self.blocks[:, _FIRST_SPLIT:], axis=0)]
        )
        self._arrays: dict[StoreSplit, Encoded] = {}
        self._starts: dict[StoreSplit, Integers] = {}

    def left_out(self, row: int) -> dict[str, int]:
        """How many documents of the block in `row` are left out, by reason."""
        return dict(zip(REASONS, self.blocks[row, 2:_FIRST_SPLIT].tolist(), strict=True))

    def read(self, row: int, split: StoreSplit) -> Encoded | None:
        """The documents of one split of the block in `row`; None if there are none."""
        first, last = self._documents[row : row + 2, SPLITS.index(split)]
        if first == last:
            return None
        if split not in self._arrays:
            names = [self.directory / f"{split}-{field.name}.npy" for field in fields(Encoded)]
            self._arrays[split] = Encoded(*(np.load(name, mmap_mode="r") for name in names))
            self._starts[split] = np.concatenate([[0], np.cumsum(self._arrays[split].lengths)])
        whole, starts = self._arrays[split], self._starts[split]
        tokens = whole.tokens[starts[first] : starts[last]]
        here = slice(first, last)
        return Encoded(tokens, whole.lengths[here], whole.bytes[here], whole.hashes[here])


class Parts:
    """All parts in a folder."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rows: dict[Place, tuple[StoredPart, int]] = {}  # where a block is
        self.totals: dict[int, int] = {}  # pieces that were read to their end -> their blocks
        self._known: set[str] = set()

    def update(self) -> Parts:
        """Take in new parts."""
        for path in sorted(self.directory.glob("part-*")):
            if path.name not in self._known and not path.suffix:
                part = StoredPart(path)
                self._known.add(path.name)
                for row, (piece, block) in enumerate(part.blocks[:, :2].tolist()):
                    self.rows[piece, block] = (part, row)
                self.totals.update(part.ends.tolist())
        return self

    def is_complete(self, pieces: int) -> bool:
        """Whether every block of all `pieces` is there."""
        return len(self.totals) == pieces and sum(self.totals.values()) == len(self.rows)

    def of_piece(self, piece: int) -> Iterator[tuple[StoredPart, int]]:
        """(part, row) of a complete piece's blocks, in order."""
        for block in range(self.totals[piece]):
            yield self.rows[piece, block]
