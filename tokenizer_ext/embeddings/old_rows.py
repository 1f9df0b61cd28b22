"""The old rows of one matrix of the vocabulary, read on demand, and their moments.

They are the base's, or those of another model to start from, in the order of the base's ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cpt_merge.checkpoint.dtypes import Float32
from cpt_merge.checkpoint.reader import Checkpoint

BATCH = 1024  # rows


class OldRows:
    """The rows of one matrix of a checkpoint, shape (rows, width)."""

    def __init__(
        self, model: Checkpoint, name: str, places: NDArray[np.int64] | None = None
    ) -> None:
        """`places`: where the old rows are in the matrix; it has nothing else if not given."""
        self._model, self._name, self._places = model, name, places
        rows = model.info(name).shape[0]
        self.rows, self.width = rows if places is None else len(places), model.info(name).row_size

    def gather(self, rows: Sequence[int]) -> Float32:
        """Some rows, shape (len(rows), width)."""
        chosen = np.array(rows, dtype=np.int64)
        if self._places is not None:
            chosen = self._places[chosen]
        return self._model.gather_float32(self._name, chosen)

    def batches(self) -> Iterator[Float32]:
        """All rows, in order, in batches of shape (up to BATCH, width)."""
        for number in range(-(-self.rows // BATCH)):
            yield self.batch(number)

    def batch(self, number: int) -> Float32:
        """The rows from `number * BATCH` on, shape (up to BATCH, width)."""
        start, stop = number * BATCH, min((number + 1) * BATCH, self.rows)
        if self._places is not None:
            return self.gather(range(start, stop))
        return self._model.read_float32(self._name, start, stop).reshape(-1, self.width)

    @cached_property
    def mean(self) -> Float32:
        """The mean row, shape (width,)."""
        if self._places is None:
            return self._model.mean_row(self._name)
        total = np.zeros(self.width)
        for rows in self.batches():
            total += rows.sum(axis=0, dtype=np.float64)
        return (total / self.rows).astype(np.float32)

    @cached_property
    def mean_norm(self) -> float:
        """The mean of the rows' norms."""
        total = 0.0
        for rows in self.batches():
            total += float(np.linalg.norm(rows, axis=1).sum(dtype=np.float64))
        return total / self.rows

    @cached_property
    def covariance_root(self) -> NDArray[np.float64]:
        """A with A Aᵀ = covariance of the rows, shape (width, width); the covariance may be
        singular.
        """
        products = np.zeros((self.width, self.width))
        for rows in self.batches():
            centred = (rows - self.mean).astype(np.float64)
            products += centred.T @ centred
        values, vectors = np.linalg.eigh(products / self.rows)
        root: NDArray[np.float64] = vectors * np.sqrt(np.maximum(values, 0))
        return root
