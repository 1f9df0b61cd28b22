"""The base's rows of one matrix of the vocabulary, read on demand, and their moments."""

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

    def __init__(self, base: Checkpoint, name: str) -> None:
        self._base, self._name = base, name
        self.rows, self.width = base.info(name).shape[0], base.info(name).row_size

    def gather(self, rows: Sequence[int]) -> Float32:
        """Some rows, shape (len(rows), width)."""
        return self._base.gather_float32(self._name, np.array(rows, dtype=np.int64))

    def batches(self) -> Iterator[Float32]:
        """All rows, in order, in batches of shape (up to BATCH, width)."""
        for number in range(-(-self.rows // BATCH)):
            yield self.batch(number)

    def batch(self, number: int) -> Float32:
        """The rows from `number * BATCH` on, shape (up to BATCH, width)."""
        start = number * BATCH
        rows = self._base.read_float32(self._name, start, min(start + BATCH, self.rows))
        return rows.reshape(-1, self.width)

    @cached_property
    def mean(self) -> Float32:
        """The mean row, shape (width,)."""
        return self._base.mean_row(self._name)

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
