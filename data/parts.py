"""Tokenised blocks on their way into a store: parts that any process writes and reads.

    PARTS/unfinished          the marker of `core.artifact.Staging`: tokenizers and settings
    PARTS/part-*/blocks.npy   int64 [blocks, 5]: digest (2 numbers), documents of each split
    PARTS/part-*/notes.json   for each block, what preparation left out or changed
    PARTS/part-*/pieces.json  pieces that were read to their ends: key -> digests of their blocks
    PARTS/part-*/SPLIT-*.npy  the blocks' documents one after the other: tokens, lengths, bytes,
                              hashes; signatures [PERMUTATIONS, documents], if near-duplicates are
                              looked for

A part takes its name when all of it is on disk. A block is known by the digest of its text, so it
does not matter which process made it, for which store, or in which file the text was: text that was
tokenised once is never tokenised again, and only new text costs time.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpt_merge.core.artifact import Staging, write_json
from cpt_merge.core.errors import UserError
from cpt_merge.data.preparation.notes import Notes
from cpt_merge.data.store import SPLITS, Integers, StoreSplit, Tokens

PART_BYTES = 64_000_000  # of tokens in one part

_FIRST_SPLIT = 2  # column of `blocks`

Digest = bytes  # 16 bytes, of a block's text
Signatures = npt.NDArray[np.uint32]  # MinHash, [documents, PERMUTATIONS]
Column = npt.NDArray[np.uint32]  # one number of the signature of each document


@dataclass(frozen=True)
class Encoded:
    """Documents one after the other. `hashes` [documents, 2]: 128 bits of each document's text."""

    tokens: Tokens
    lengths: Integers
    bytes: Integers
    hashes: npt.NDArray[np.uint64]


@dataclass(frozen=True)
class TokenBlock:
    """Successive documents of a piece, tokenised and divided into splits."""

    digest: Digest
    notes: Notes
    splits: dict[StoreSplit, Encoded]
    signatures: dict[StoreSplit, Signatures]  # empty if near-duplicates are not looked for


class PartWriter:
    """Collects the blocks of one process and writes them as parts."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._blocks: list[TokenBlock] = []
        self._pieces: dict[str, list[Digest]] = {}
        self._size = 0

    def add(self, block: TokenBlock) -> None:
        """Take a block, and write a part if there is enough."""
        self._blocks.append(block)
        self._size += sum(encoded.tokens.nbytes for encoded in block.splits.values())
        if self._size >= PART_BYTES:
            self.flush()

    def end(self, piece: str, blocks: list[Digest]) -> None:
        """Note which blocks a piece has, by its key."""
        self._pieces[piece] = blocks

    def flush(self) -> None:
        """Write what was collected."""
        if not self._blocks and not self._pieces:
            return
        name = secrets.token_hex(8)
        rows = []
        for block in self._blocks:
            counts = [len(block.splits[s].lengths) if s in block.splits else 0 for s in SPLITS]
            rows.append([*np.frombuffer(block.digest, np.int64), *counts])
        with Staging(self.directory / f"part-{name}").filling() as part:
            np.save(
                part / "blocks.npy",
                np.asarray(rows, np.int64).reshape(-1, _FIRST_SPLIT + len(SPLITS)),
            )
            write_json(part / "notes.json", [block.notes.as_dict() for block in self._blocks])
            named = {key: [one.hex() for one in blocks] for key, blocks in self._pieces.items()}
            write_json(part / "pieces.json", named)
            for split in SPLITS:
                encoded = [block.splits[split] for block in self._blocks if split in block.splits]
                for field in fields(Encoded) if encoded else ():
                    values = np.concatenate([getattr(one, field.name) for one in encoded])
                    np.save(part / f"{split}-{field.name}.npy", values)
                signatures = [
                    block.signatures[split] for block in self._blocks if split in block.signatures
                ]
                if signatures:
                    columns = np.ascontiguousarray(np.concatenate(signatures).T)
                    np.save(part / f"{split}-signatures.npy", columns)
        self._blocks, self._pieces, self._size = [], {}, 0


class StoredPart:
    """A part on disk; its arrays are memory-mapped at the first use."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with _damage(directory):
            self.blocks: Integers = np.load(directory / "blocks.npy")
            self.pieces: dict[str, list[str]] = json.loads((directory / "pieces.json").read_text())
        self._documents = np.concatenate(
            [np.zeros((1, len(SPLITS)), np.int64), np.cumsum(self.blocks[:, _FIRST_SPLIT:], axis=0)]
        )
        self._arrays: dict[StoreSplit, Encoded] = {}
        self._starts: dict[StoreSplit, Integers] = {}
        self._signatures: dict[StoreSplit, Signatures] = {}  # transposed
        self._notes: list[dict[str, Any]] | None = None

    def notes(self, row: int) -> Notes:
        """What preparation left out or changed in the block in `row`."""
        if self._notes is None:
            with _damage(self.directory):
                content = (self.directory / "notes.json").read_text(encoding="utf-8")
                self._notes = json.loads(content)
        return Notes.of(self._notes[row])

    def read(self, row: int, split: StoreSplit) -> Encoded | None:
        """The documents of one split of the block in `row`; None if there are none."""
        first, last = self._documents[row : row + 2, SPLITS.index(split)]
        if first == last:
            return None
        if split not in self._arrays:
            names = [self.directory / f"{split}-{field.name}.npy" for field in fields(Encoded)]
            with _damage(self.directory):
                self._arrays[split] = Encoded(*(np.load(name, mmap_mode="r") for name in names))
            self._starts[split] = np.concatenate([[0], np.cumsum(self._arrays[split].lengths)])
        whole, starts = self._arrays[split], self._starts[split]
        tokens = whole.tokens[starts[first] : starts[last]]
        here = slice(first, last)
        return Encoded(tokens, whole.lengths[here], whole.bytes[here], whole.hashes[here])

    def signature_column(self, row: int, split: StoreSplit, column: int) -> Column:
        """One number of the signature of each document of the block in `row`."""
        first, last = self._documents[row : row + 2, SPLITS.index(split)]
        if first == last:
            return np.zeros(0, np.uint32)
        if split not in self._signatures:
            path = self.directory / f"{split}-signatures.npy"
            with _damage(self.directory):
                self._signatures[split] = np.load(path, mmap_mode="r")
        return self._signatures[split][column, first:last]


@contextmanager
def _damage(part: Path) -> Iterator[None]:
    """Turn the errors of files that are cut off or missing into a `UserError`."""
    try:
        yield
    except (OSError, EOFError, ValueError) as error:
        raise UserError(
            f"{part} is damaged ({error}); remove it and run the same command again, which "
            "tokenises its text again."
        ) from error


class Parts:
    """All parts in a folder."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rows: dict[Digest, tuple[StoredPart, int]] = {}  # where a block is
        self.pieces: dict[str, list[Digest]] = {}  # of what was read to its end, by key
        self._known: dict[str, StoredPart] = {}  # by the name of its folder

    def update(self) -> Parts:
        """Take in new parts."""
        for path in sorted(self.directory.glob("part-*")):
            if path.name not in self._known and not path.suffix:
                part = self._known[path.name] = StoredPart(path)
                for row, digest in enumerate(part.blocks[:, :2]):
                    self.rows[digest.tobytes()] = (part, row)
                for key, blocks in part.pieces.items():
                    self.pieces[key] = [bytes.fromhex(block) for block in blocks]
        return self

    def is_complete(self, pieces: Iterable[str]) -> bool:
        """Whether every block of all `pieces` is there."""
        return all(
            key in self.pieces and all(block in self.rows for block in self.pieces[key])
            for key in pieces
        )

    def blocks(self, pieces: Iterable[str]) -> Iterator[tuple[StoredPart, int]]:
        """(part, row) of the blocks of complete pieces, in order."""
        return (self.rows[block] for piece in pieces for block in self.pieces[piece])

    def read(self, pieces: Iterable[str], split: StoreSplit) -> Iterator[Encoded]:
        """The documents of one split of complete pieces, block by block."""
        for part, row in self.blocks(pieces):
            encoded = part.read(row, split)
            if encoded is not None:
                yield encoded

    def signature_column(self, pieces: Iterable[str], split: StoreSplit, column: int) -> Column:
        """One number of the signature of each document of one split of complete pieces."""
        found = [part.signature_column(row, split, column) for part, row in self.blocks(pieces)]
        return np.concatenate([np.zeros(0, np.uint32), *found])

    def remove_unused(self, pieces: Iterable[str]) -> None:
        """Remove parts that have no block and no list of any of `pieces`."""
        wanted = set(pieces)
        used = {self.rows[block][0].directory for key in wanted for block in self.pieces[key]}
        for part in self._known.values():
            if part.directory not in used and not wanted & part.pieces.keys():
                Staging(part.directory).remove_target()
