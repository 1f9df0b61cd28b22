"""A mean of old rows, weighted by how similar the tokens' contexts in the new text are (after
FOCUS).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cpt_merge.checkpoint.dtypes import Float32
from cpt_merge.checkpoint.vocabulary_map import NewPiece
from cpt_merge.tokenizer_ext.embeddings.methods.method import NewRows
from cpt_merge.tokenizer_ext.embeddings.methods.spelling import Spelling, spelt_rows
from cpt_merge.tokenizer_ext.embeddings.old_rows import BATCH, OldRows
from cpt_merge.tokenizer_ext.embeddings.token_space import TokenSpace

GROUP = 4096  # pieces for which the old rows are read once
COMPARED = 256  # pieces whose similarities to all tokens are in memory at once


def focus(task: NewRows) -> Iterator[Float32]:
    """Halfway between the mean of a piece's constituents and the mean of similar tokens' rows.

    The latter is weighted by similarity in the `TokenSpace`; a new piece among the similar tokens
    counts as the mean of its constituents. FOCUS itself uses old tokens only and no constituents,
    which is worse (docs/embeddings.md). Pieces that are too rare in the text start from their
    constituents alone. No norm is changed.
    """
    if task.space is None:
        raise ValueError("focus needs the space of the new text's tokens")
    space, spelt = task.space, spelt_rows(task, lambda piece: Spelling())
    by_id = {piece.id: piece for piece in task.pieces}
    known = np.flatnonzero(space.known).tolist()
    tokens = [token for token in known if token < task.old.rows or token in by_id]
    for start in range(0, len(task.pieces), GROUP):
        group = task.pieces[start : start + GROUP]
        rows = np.stack([next(spelt) for _ in group])
        similar = np.array([len(tokens) > 1 and bool(space.known[piece.id]) for piece in group])
        ids = [piece.id for piece, yes in zip(group, similar, strict=True) if yes]
        rows[similar] += _weighted(_similarities(space, ids, tokens), len(ids), task.old, by_id)
        rows[similar] /= 2
        yield rows


@dataclass(frozen=True)
class _Similarities:
    """The weights that are not 0, by token: places of the pieces, ids of the tokens, weights."""

    pieces: NDArray[np.int64]
    tokens: NDArray[np.int64]
    weights: Float32

    def of_tokens(self, first: int, last: int) -> _Similarities:
        """Those of the tokens [first, last)."""
        low, high = np.searchsorted(self.tokens, [first, last])
        return _Similarities(self.pieces[low:high], self.tokens[low:high], self.weights[low:high])

    def add_rows(self, total: Float32, rows: Float32, places: NDArray[np.int64]) -> None:
        """Add the weighted rows to the pieces' sums; `places` are those of the tokens' rows."""
        order = np.argsort(self.pieces, kind="stable")
        pieces, starts = np.unique(self.pieces[order], return_index=True)
        for piece, part in zip(pieces, np.split(order, starts[1:]), strict=True):
            total[piece] += self.weights[part] @ rows[places[part]]


def _similarities(space: TokenSpace, ids: Sequence[int], tokens: Sequence[int]) -> _Similarities:
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], Float32]] = []
    numbers = np.array(tokens, np.int64)
    for start in range(0, len(ids), COMPARED):
        weights = space.weights(ids[start : start + COMPARED], tokens)
        pieces, places = np.nonzero(weights)
        found.append((pieces + start, numbers[places], weights[pieces, places]))
    if not found:
        return _Similarities(numbers[:0], numbers[:0], np.empty(0, np.float32))
    pieces, of, weights = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.argsort(of, kind="stable")
    return _Similarities(pieces[order], of[order], weights[order])


def _weighted(
    similar: _Similarities, count: int, old: OldRows, pieces: Mapping[int, NewPiece]
) -> Float32:
    """The weighted sums of the similar tokens' rows, shape (count, width).

    Rows are read once for all pieces of a group, in the order in which they are stored.
    """
    total = np.zeros((count, old.width), np.float32)
    for number in range(-(-old.rows // BATCH)):
        part = similar.of_tokens(number * BATCH, min((number + 1) * BATCH, old.rows))
        if len(part.tokens):
            part.add_rows(total, old.batch(number), part.tokens - number * BATCH)
    new = np.unique(similar.of_tokens(old.rows, sys.maxsize).tokens).tolist()
    for start in range(0, len(new), BATCH):
        some = new[start : start + BATCH]
        part = similar.of_tokens(some[0], some[-1] + 1)
        rows = np.stack([_mean(old, pieces[token]) for token in some])
        part.add_rows(total, rows, np.searchsorted(some, part.tokens))
    return total


def _mean(old: OldRows, piece: NewPiece) -> Float32:
    """The mean of a piece's constituents, shape (width,)."""
    rows = old.gather(piece.constituents) if piece.constituents else old.mean[None]
    mean: Float32 = rows.mean(axis=0)
    return mean
