"""A mean of old rows, weighted by how similar the tokens' contexts in the new text are (after
FOCUS).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from cpt_merge.checkpoint.dtypes import Float32
from cpt_merge.checkpoint.vocabulary_map import NewPiece
from cpt_merge.tokenizer_ext.embeddings.methods.method import NewRows
from cpt_merge.tokenizer_ext.embeddings.methods.spelling import Spelling, spelt_rows
from cpt_merge.tokenizer_ext.embeddings.old_rows import OldRows

COMPARED = 128  # pieces whose similarities to all tokens are in memory at once


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
    for start in range(0, len(task.pieces), COMPARED):
        batch = task.pieces[start : start + COMPARED]
        rows = np.stack([next(spelt) for _ in batch])
        similar = np.array([len(tokens) > 1 and bool(space.known[piece.id]) for piece in batch])
        weights = space.weights(
            [piece.id for piece, yes in zip(batch, similar, strict=True) if yes], tokens
        )
        used = np.flatnonzero(weights.any(axis=0))
        chosen = _rows_of(task.old, [tokens[place] for place in used], by_id)
        rows[similar] += weights[:, used] @ chosen
        rows[similar] /= 2
        yield rows


def _rows_of(old: OldRows, tokens: Sequence[int], pieces: Mapping[int, NewPiece]) -> Float32:
    """The rows of old tokens and the constituents' means of new pieces, in the given order:
    (tokens, width).
    """
    rows = np.empty((len(tokens), old.width), np.float32)
    is_old = np.array([token not in pieces for token in tokens], bool)
    rows[is_old] = old.gather([token for token in tokens if token not in pieces])
    for place, token in enumerate(tokens):
        if token in pieces:
            made_of = pieces[token].constituents
            rows[place] = old.gather(made_of).mean(axis=0) if made_of else old.mean
    return rows
