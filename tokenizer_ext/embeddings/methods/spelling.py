"""Rows made from the tokens that spelt a piece before, which several methods start from."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from cpt_merge.checkpoint.dtypes import Float32, narrow
from cpt_merge.checkpoint.vocabulary_map import NewPiece
from cpt_merge.tokenizer_ext.embeddings.methods.method import NewRows

NOISE = 0.01  # of a row's own size: just above bfloat16's rounding, so that equal rows differ


@dataclass(frozen=True)
class Spelling:
    """How a row is made from the rows of a piece's constituents."""

    share: float = 0  # of one end's row: the first constituent in a head, the last one elsewhere
    norm: float | None = None  # that the row is scaled to


def spelt_rows(task: NewRows, spelling_of: Callable[[NewPiece], Spelling]) -> Iterator[Float32]:
    """For each piece, (1 - share) of its constituents' mean plus `share` of one end's row, shape
    (width,).

    A row that would equal an old row or an earlier new one gets a little noise. Equal are the rows
    of the same constituents in another order, or as often repeated (a word and its reduplication
    have one mean), of a single constituent, and of constituents whose rows are equal because nobody
    trained them.
    """
    old, end = task.old, 0 if task.use == "head" else -1
    seen = {frozenset({(_digest(row), Fraction(1))}) for rows in old.batches() for row in rows}
    for piece in task.pieces:
        spelling = spelling_of(piece)
        rows = old.gather(piece.constituents) if piece.constituents else old.mean[None]
        row: Float32 = rows.mean(axis=0)
        row += np.float32(spelling.share) * (rows[end] - row)
        length = float(np.linalg.norm(row))
        if spelling.norm is not None and length > 0:
            row *= spelling.norm / length
        made_of = frozenset(_weights(rows, spelling.share, end).items())
        if made_of in seen:
            row += task.isotropic(1)[0] * NOISE
        seen.add(made_of)
        yield row


def _weights(rows: Float32, share: float, end: int) -> dict[bytes, Fraction]:
    """How much of each different row a new row holds, exactly."""
    digests, weights = [_digest(row) for row in rows], defaultdict[bytes, Fraction](Fraction)
    for digest in digests:
        weights[digest] += (1 - Fraction(share)) / len(rows)
    weights[digests[end]] += Fraction(share)
    return weights


def _digest(row: Float32) -> bytes:
    """Identifies a row by its values as bfloat16, the coarsest type that they are stored in."""
    return hashlib.blake2b(narrow(row, "BF16").tobytes(), digest_size=8).digest()
