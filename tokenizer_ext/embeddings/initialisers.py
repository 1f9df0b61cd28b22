"""What the rows of new pieces start from. Each initialiser is one function; `INITIALISERS` is all that knows them.

They yield the rows of the pieces, in order, in batches of float32, so that memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cpt_merge.checkpoint.dtypes import Float32
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.vocabulary_map import NewPiece
from cpt_merge.merge.config import Method
from cpt_merge.tokenizer_ext.embeddings.focus import TokenSpace

BATCH = 1024  # rows
ALIKE = 128  # pieces whose likeness to all tokens is held at once
NOISE = (
    0.01  # of a row's own size: just more than bfloat16's rounding, so that equal rows come apart
)


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
        return self._base.mean_row(self._name)

    @cached_property
    def mean_norm(self) -> float:
        """The mean of the rows' norms."""
        return (
            sum(
                float(np.linalg.norm(rows, axis=1).sum(dtype=np.float64)) for rows in self.batches()
            )
            / self.rows
        )

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


Use = Literal["input", "head", "both"]  # both: the one matrix of a tied model


@dataclass(frozen=True)
class Task:
    """What is to be initialised, and all that it may be made from."""

    pieces: Sequence[NewPiece]
    old: OldRows
    random: np.random.Generator
    use: Use = "input"  # what the rows are for
    space: TokenSpace | None = None  # of the new text's tokens; there for `focus`


Initialiser = Callable[[Task], Iterator[Float32]]


def constituents(task: Task) -> Iterator[Float32]:
    """The mean of the rows that spelt the piece before, at the old rows' mean norm.

    A mean is shorter than what it is made of, hence the norm. Where two rows would be equal (the same constituents
    in another order, or a single one), the later one gets a little noise.
    """
    for row in _spelt(task, norm=task.old.mean_norm):
        yield row[None]


def ends(task: Task) -> Iterator[Float32]:
    """The mean of the rows that spelt the piece before, leaning on one of its ends, with the norm that comes of it.

    What follows a piece follows its last constituent, and what is predicted in a piece's place is its first one. So
    the input leans on the last and the head on the first; the head less, or pieces that begin alike could not be told
    apart. A tied matrix leans on neither. The idea is EEVE's (Kim et al., 2024, https://arxiv.org/abs/2402.14714: mean
    for the input, first for the head), the shares are measured (docs/embeddings.md). Equal rows come apart as above.
    """
    share = SHARES_OF_ENDS[task.use]
    for row in _spelt(task, share):
        yield row[None]


def focus(task: Task) -> Iterator[Float32]:
    """Halfway between the mean of a piece's constituents and the mean of the tokens that it is like in the new text.

    The latter is weighted by likeness (`merge/focus.py`); a new piece among them stands for its constituents. FOCUS has
    old tokens only and no constituents, which is worse (docs/embeddings.md). Pieces that the text has too rarely have
    the mean of their constituents. No norm is changed.
    """
    space, spelt = _space(task), _spelt(task)
    by_id = {piece.id: piece for piece in task.pieces}
    tokens = [
        int(token)
        for token in np.flatnonzero(space.known)
        if token < task.old.rows or int(token) in by_id
    ]
    for start in range(0, len(task.pieces), ALIKE):
        batch = task.pieces[start : start + ALIKE]
        rows = np.stack([next(spelt) for _ in batch])
        alike = np.array([len(tokens) > 1 and bool(space.known[piece.id]) for piece in batch])
        weights = space.weights(
            [piece.id for piece, yes in zip(batch, alike, strict=True) if yes], tokens
        )
        used = np.flatnonzero(weights.any(axis=0))
        rows[alike] += weights[:, used] @ _rows_of(
            task.old, [tokens[place] for place in used], by_id
        )
        rows[alike] /= 2
        yield rows


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


SHARES_OF_ENDS: dict[Use, float] = {"input": 0.5, "head": 0.25, "both": 0}

INITIALISERS: dict[Method, Initialiser] = {
    "constituents": constituents,
    "ends": ends,
    "focus": focus,
    "mean": mean,
    "gaussian": gaussian,
    "random": isotropic,
}


def _spelt(task: Task, share: float = 0, norm: float | None = None) -> Iterator[Float32]:
    """For each piece, (1 - share) of its constituents' mean and `share` of its last one's row (head: its first's).

    Brought to a norm if one is given. A row that would equal an earlier one, or an old one, gets a little noise.
    """
    old, end = task.old, 0 if task.use == "head" else -1
    seen: set[tuple[int, ...]] = {(row, row) for row in range(old.rows)}
    for piece in task.pieces:
        made_of = sorted(piece.constituents)
        rows = old.gather(piece.constituents) if made_of else old.mean[None]
        row: Float32 = rows.mean(axis=0)
        row += np.float32(share) * (rows[end] - row)
        length = float(np.linalg.norm(row))
        if norm is not None and length > 0:
            row *= norm / length
        leaning = [piece.constituents[end]] if share and made_of else made_of[:1]
        if (key := (*made_of, *leaning)) in seen:
            row += _isotropic(1, task)[0] * NOISE
        seen.add(key)
        yield row


def _rows_of(old: OldRows, tokens: Sequence[int], pieces: Mapping[int, NewPiece]) -> Float32:
    """The rows of old tokens, and the constituents' means of new pieces, in the given order: shape (tokens, width)."""
    rows = np.empty((len(tokens), old.width), np.float32)
    is_old = np.array([token not in pieces for token in tokens], bool)
    rows[is_old] = old.gather([token for token in tokens if token not in pieces])
    for place, token in enumerate(tokens):
        if token in pieces:
            made_of = pieces[token].constituents
            rows[place] = old.gather(made_of).mean(axis=0) if made_of else old.mean
    return rows


def _space(task: Task) -> TokenSpace:
    if task.space is None:
        raise ValueError("focus needs the space of the new text's tokens")
    return task.space


def _isotropic(count: int, task: Task) -> Float32:
    drawn: Float32 = task.random.standard_normal((count, task.old.width)).astype(np.float32)
    drawn *= np.float32(task.old.mean_norm / np.sqrt(task.old.width))
    return drawn


def _batch_sizes(pieces: Sequence[NewPiece]) -> Iterator[int]:
    for start in range(0, len(pieces), BATCH):
        yield min(BATCH, len(pieces) - start)
