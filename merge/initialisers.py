"""What the rows of new pieces start from. Each initialiser is one function; `INITIALISERS` is all that knows them.

They yield the rows of the pieces, in order, in batches of float32, so that memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from checkpoint.dtypes import Float32
from checkpoint.reader import Checkpoint
from checkpoint.vocabulary import NewPiece
from merge.config import Method
from merge.focus import TokenSpace

BATCH = 1024  # rows
NOISE = 0.01  # of a row's own size: just more than bfloat16's rounding, so that equal rows come apart


class OldRows:
    """The base's rows of one matrix, shape (rows, width): read on demand, their moments in one pass."""

    def __init__(self, base: Checkpoint, name: str) -> None:
        self._base, self._name = base, name
        self.rows, self.width = base.info(name).shape[0], base.info(name).row_size

    def gather(self, rows: Sequence[int]) -> Float32:
        """Some rows, shape (len(rows), width)."""
        return self._base.gather_float32(self._name, np.array(rows, dtype=np.int64))

    def batches(self) -> Iterator[Float32]:
        """All rows."""
        for start in range(0, self.rows, BATCH):
            rows = self._base.read_float32(self._name, start, min(start + BATCH, self.rows))
            yield rows.reshape(-1, self.width)

    @cached_property
    def mean(self) -> Float32:
        """The mean row, shape (width,)."""
        total = np.zeros(self.width)
        for rows in self.batches():
            total += rows.sum(axis=0, dtype=np.float64)
        return (total / self.rows).astype(np.float32)

    @cached_property
    def mean_norm(self) -> float:
        """The mean of the rows' norms."""
        return sum(float(np.linalg.norm(rows, axis=1).sum(dtype=np.float64)) for rows in self.batches()) / self.rows

    @cached_property
    def covariance_root(self) -> NDArray[np.float64]:
        """A with A Aᵀ = covariance of the rows, shape (width, width), also where there are fewer rows than columns."""
        products = np.zeros((self.width, self.width))
        for rows in self.batches():
            centred = (rows - self.mean).astype(np.float64)
            products += centred.T @ centred
        values, vectors = np.linalg.eigh(products / self.rows)
        root: NDArray[np.float64] = vectors * np.sqrt(np.maximum(values, 0))
        return root


@dataclass(frozen=True)
class Task:
    """What is to be initialised, and all that it may be made from."""

    pieces: Sequence[NewPiece]
    old: OldRows
    random: np.random.Generator
    space: TokenSpace | None = None  # of the new text; there for `focus`


Initialiser = Callable[[Task], Iterator[Float32]]


def constituents(task: Task) -> Iterator[Float32]:
    """The mean of the rows that spelt the piece before, at the old rows' mean norm.

    A mean is shorter than what it is made of, hence the norm. Where two rows would be equal (the same constituents
    in another order, or a single one), the later one gets a little noise.
    """
    old = task.old
    seen: set[tuple[int, ...]] = {(row,) for row in range(old.rows)}
    for piece in task.pieces:
        made_of = tuple(sorted(piece.constituents))
        row = old.gather(piece.constituents).mean(axis=0) if made_of else old.mean.copy()
        norm = float(np.linalg.norm(row))
        if norm > 0:
            row *= old.mean_norm / norm
        if made_of in seen:
            row += _isotropic(1, task)[0] * NOISE
        seen.add(made_of)
        yield row[None]


def focus(task: Task) -> Iterator[Float32]:
    """The mean of old rows, weighted by how alike their tokens are to the piece in the new text (`merge/focus.py`).

    The old tokens of that text are the anchors. A mean of rows keeps what they have in common, so its norm is left as
    it is. Pieces that the text has too rarely start from their constituents.
    """
    known, anchors = _space(task).known, _anchors(task)
    rest = [piece for piece in task.pieces if not known[piece.id] or not len(anchors)]
    others = constituents(replace(task, pieces=rest))
    for start in range(0, len(task.pieces), BATCH):
        batch = task.pieces[start : start + BATCH]
        alike = [len(anchors) > 0 and bool(known[piece.id]) for piece in batch]
        rows = np.empty((len(batch), task.old.width), np.float32)
        rows[alike] = _weighted_means(task, [piece.id for piece, yes in zip(batch, alike, strict=True) if yes], anchors)
        for place in np.flatnonzero(np.logical_not(alike)):
            rows[place] = next(others)
        yield rows


def _weighted_means(task: Task, tokens: Sequence[int], anchors: NDArray[np.int64]) -> Float32:
    """Shape (tokens, width). Only anchors that any of the tokens needs are read."""
    weights = _space(task).weights(np.array(tokens, np.int64), anchors)
    used = np.flatnonzero(weights.any(axis=0))
    means: Float32 = weights[:, used] @ task.old.gather(anchors[used].tolist())
    return means


def _anchors(task: Task) -> NDArray[np.int64]:
    """The old tokens of the new text."""
    return np.flatnonzero(_space(task).known[: task.old.rows])


def _space(task: Task) -> TokenSpace:
    if task.space is None:
        raise ValueError("focus needs the space of the new text's tokens")
    return task.space


def mean(task: Task) -> Iterator[Float32]:
    """The mean of all old rows, for all alike."""
    for count in _batch_sizes(task.pieces):
        yield np.tile(task.old.mean, (count, 1))


def gaussian(task: Task) -> Iterator[Float32]:
    """Drawn from the normal distribution with the old rows' mean and covariance.

    John Hewitt, Initializing New Word Embeddings for Pretrained Language Models, 2021.
    """
    for count in _batch_sizes(task.pieces):
        drawn = task.random.standard_normal((count, task.old.width)) @ task.old.covariance_root.T
        yield (task.old.mean + drawn).astype(np.float32)


def isotropic(task: Task) -> Iterator[Float32]:
    """Drawn around zero, every direction alike, with about the old rows' mean norm."""
    for count in _batch_sizes(task.pieces):
        yield _isotropic(count, task)


INITIALISERS: dict[Method, Initialiser] = {
    "constituents": constituents,
    "focus": focus,
    "mean": mean,
    "gaussian": gaussian,
    "random": isotropic,
}


def _isotropic(count: int, task: Task) -> Float32:
    drawn: Float32 = task.random.standard_normal((count, task.old.width)).astype(np.float32)
    drawn *= np.float32(task.old.mean_norm / np.sqrt(task.old.width))
    return drawn


def _batch_sizes(pieces: Sequence[NewPiece]) -> Iterator[int]:
    for start in range(0, len(pieces), BATCH):
        yield min(BATCH, len(pieces) - start)
