"""Which documents of the parts get into the store: the first of equal and of similar ones.

Held-out documents come first, so of a cluster of similar ones a held-out document stays: training
must not see the text by which it is measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cpt_merge.data.near_duplicates import cluster_firsts
from cpt_merge.data.parts import Column, Parts
from cpt_merge.data.preparation.notes import MOST_EXAMPLES
from cpt_merge.data.store import Integers, StoreSplit, Tokens

Keep = npt.NDArray[np.bool_]
Pieces = list[list[str]]  # the keys of the pieces of each source


@dataclass(frozen=True)
class DocumentOrder:
    """The documents of all sources in one order: the held-out ones, then the others."""

    parts: Parts
    pieces: Pieces

    @property
    def sections(self) -> Iterable[tuple[StoreSplit, int]]:
        """(split, source)."""
        splits: tuple[StoreSplit, ...] = ("heldout", "train")
        return ((split, source) for split in splits for source in range(len(self.pieces)))

    def starts(self) -> Integers:
        """The number of the first document of each section, and the end."""
        counts = [
            sum(len(encoded.lengths) for encoded in self.parts.read(self.pieces[source], split))
            for split, source in self.sections
        ]
        return np.cumsum([0, *counts])

    def hashes(self) -> npt.NDArray[np.uint64]:
        """The hash of each document, [documents, 2]."""
        found = [
            encoded.hashes
            for split, source in self.sections
            for encoded in self.parts.read(self.pieces[source], split)
        ]
        return np.concatenate([np.zeros((0, 2), np.uint64), *found])

    def column(self, number: int) -> Column:
        """One number of the signature of each document."""
        sections = self.sections
        columns = [
            self.parts.signature_column(self.pieces[n], split, number) for split, n in sections
        ]
        return np.concatenate(columns)

    def tokens(self, wanted: set[int]) -> dict[int, Tokens]:
        """The tokens of some documents, by their numbers."""
        found, first = dict[int, Tokens](), 0
        for split, source in self.sections:
            for encoded in self.parts.read(self.pieces[source], split):
                ends = np.cumsum(encoded.lengths)
                for number in wanted.intersection(range(first, first + len(ends))):
                    end = int(ends[number - first])
                    found[number] = encoded.tokens[end - int(encoded.lengths[number - first]) : end]
                first += len(ends)
        return found


@dataclass(frozen=True)
class Pair:
    """A document of a source that is left out, and the similar one that is kept."""

    source: int
    left_out: Tokens
    kept: Tokens


@dataclass(frozen=True)
class Selection:
    """The documents that are kept, by split and source, and what became of the others."""

    keep: dict[tuple[StoreSplit, int], Keep]
    left_out: list[dict[str, int]]  # of each source, by reason
    pairs: list[Pair]  # examples of near-duplicates

    def of(self, split: StoreSplit, source: int) -> Keep | None:
        """Which documents of a split of a source are kept; None for all."""
        # the reference split has the text of the held-out one
        return self.keep.get(("heldout" if split == "reference" else split, source))


def select(
    parts: Parts, pieces: Pieces, deduplicate: bool, near_duplicates: float | None
) -> Selection:
    """Find equal documents, and those with a similarity of at least `near_duplicates`."""
    if not deduplicate and near_duplicates is None:
        return Selection({}, [{"duplicates": 0} for _ in pieces], [])
    documents = DocumentOrder(parts, pieces)
    starts = documents.starts()
    numbers = np.arange(starts[-1])
    is_unique = first_occurrences(documents.hashes()) if deduplicate else np.ones(starts[-1], bool)
    firsts = numbers
    if near_duplicates is not None:
        firsts = cluster_firsts(documents.column, int(starts[-1]), near_duplicates)
    similar = is_unique & (firsts != numbers)
    keep, left_out, examples = {}, [{"duplicates": 0} for _ in pieces], list[tuple[int, int]]()
    for section, start, end in zip(documents.sections, starts, starts[1:], strict=False):
        source = section[1]
        keep[section] = is_unique[start:end] & ~similar[start:end]
        left_out[source]["duplicates"] += int((~is_unique[start:end]).sum())
        if near_duplicates is not None:
            found = np.flatnonzero(similar[start:end]) + start
            left_out[source].setdefault("near_duplicates", 0)
            left_out[source]["near_duplicates"] += len(found)
            examples += [(source, number) for number in found[:MOST_EXAMPLES].tolist()]
    return Selection(keep, left_out, _pairs(documents, firsts, examples))


def _pairs(
    documents: DocumentOrder, firsts: Integers, examples: list[tuple[int, int]]
) -> list[Pair]:
    wanted = [(source, number, int(firsts[number])) for source, number in examples]
    tokens = documents.tokens({number for _, *numbers in wanted for number in numbers})
    return [Pair(source, tokens[number], tokens[kept]) for source, number, kept in wanted]


def first_occurrences(hashes: npt.NDArray[np.uint64]) -> Keep:
    """Which rows of `hashes` [documents, 2] occur for the first time.

    Takes about 50 bytes of memory per row.
    """
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal rows keep their order
    ordered = hashes[order]
    keep = np.ones(len(hashes), np.bool_)
    keep[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return keep
