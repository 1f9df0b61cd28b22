"""Rows made from the tokens that spelt a piece before, which several methods start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from cpt_merge.checkpoint.dtypes import Float32
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

    A row that would equal an earlier new row or an old one (the same constituents in another order,
    or a single constituent) gets a little noise.
    """
    old, end = task.old, 0 if task.use == "head" else -1
    seen: set[tuple[int, ...]] = {(row, row) for row in range(old.rows)}
    for piece in task.pieces:
        spelling, made_of = spelling_of(piece), sorted(piece.constituents)
        rows = old.gather(piece.constituents) if made_of else old.mean[None]
        row: Float32 = rows.mean(axis=0)
        row += np.float32(spelling.share) * (rows[end] - row)
        length = float(np.linalg.norm(row))
        if spelling.norm is not None and length > 0:
            row *= spelling.norm / length
        leaning = [piece.constituents[end]] if spelling.share and made_of else made_of[:1]
        if (key := (*made_of, *leaning)) in seen:
            row += task.isotropic(1)[0] * NOISE
        seen.add(key)
        yield row
