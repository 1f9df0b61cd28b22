"""Which packed row is the i-th of the run: a pure function of (seed, i), the same at any world size, after any resume.

Rows are fixed windows of a source's token file, so a row is found without reading what comes before it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from core.errors import UserError

BLOCK = 1000  # rows within which the mixture's shares are exact


def permuted(index: int, size: int, seed: str) -> int:
    """The `index`-th element of a pseudo-random permutation of `range(size)`, in constant time and memory.

    A four-round Feistel network on the next even power of two, walked until the value falls in range (Black and
    Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    value = index
    while True:
        left, right = value >> half, value & mask
        for turn in range(4):
            digest = hashlib.blake2b(f"{seed}/{turn}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        value = left << half | right
        if value < size:
            return value


@dataclass(frozen=True)
class RowPlace:
    """Where a row of the run is read from."""

    source: int
    row: int


class RowOrder:
    """The order of the rows of a run over several sources with weights.

    Within every block of `BLOCK` rows each source has its exact share, in a shuffled order; each source runs
    through a fresh permutation of its rows in every epoch.
    """

    def __init__(self, rows: list[int], weights: list[float], seed: int) -> None:
        """`rows[s]` is the number of packed rows of source s, `weights[s]` its share of the mixture."""
        self.rows, self.seed = rows, seed
        self.quota = _quotas(weights)
        for source, quota in enumerate(self.quota):
            if quota == 0:
                raise UserError(f"the weight of corpus.sources.{source} is under 1/{BLOCK} of the mixture; raise it.")
        self._pattern = np.repeat(np.arange(len(rows)), self.quota)
        self._block: tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None

    def place(self, index: int) -> RowPlace:
        """The place of the `index`-th row of the run."""
        block, offset = divmod(index, BLOCK)
        sources, counts = self._shuffled(block)
        source = int(sources[offset])
        nth = block * self.quota[source] + int(counts[offset])
        epoch, position = divmod(nth, self.rows[source])
        return RowPlace(source, permuted(position, self.rows[source], f"{self.seed}/{source}/{epoch}"))

    def _shuffled(self, block: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The sources of a block in order, and how many of the same source came before each within the block."""
        if self._block is None or self._block[0] != block:
            sources = np.random.Generator(np.random.Philox(key=[self.seed, block])).permutation(self._pattern)
            counts = np.zeros(BLOCK, dtype=np.int64)
            for source in range(len(self.rows)):
                mine = sources == source
                counts[mine] = np.arange(mine.sum())
            self._block = (block, sources, counts)
        return self._block[1], self._block[2]


def _quotas(weights: list[float]) -> list[int]:
    """Rows of each source in a block, by the largest-remainder method."""
    exact = np.asarray(weights) / sum(weights) * BLOCK
    quota = np.floor(exact).astype(int)
    for source in np.argsort(quota - exact, kind="stable")[: BLOCK - quota.sum()]:
        quota[source] += 1
    return [int(value) for value in quota]
