"""Which packed sequence is the i-th of the run: a pure function of (seed, i).

It does not depend on the world size or on resuming (invariant "exact resume"). Sequences are fixed
windows of the token file of a source, so each is found without reading what comes before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cpt_merge.core.errors import UserError

BLOCK = 1024  # sequences that are shuffled together
LEVELS = 30
HORIZON = BLOCK << LEVELS  # sequences, about 10^12; more than any run has

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


def mix(values: Words) -> Words:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), a bijection of 64-bit words."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def keys(seed: int, *numbers: int | Integers) -> Words:
    """A pseudo-random 64-bit word for each tuple of numbers, by `mix`."""
    word = mix(np.asarray([seed % 2**64], np.uint64))
    for number in numbers:
        word = mix(word + np.uint64(0x9E3779B97F4A7C15) + np.asarray(number).astype(np.uint64))
    return word


def permuted(indices: Integers, size: int, key: Words) -> Integers:
    """Where the pseudo-random permutation of `range(size)` named by `key` takes each index.

    A four-round Feistel network on the next even power of two, applied until the value is in range
    (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002), so no table is needed. `key`
    is one word, or one for each index.
    """
    half = np.uint64(max((size - 1).bit_length() + 1, 2) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    rounds = [mix(key + np.uint64(turn)) for turn in range(1, 5)]
    values = indices.astype(np.uint64)
    outside = np.ones(values.shape, np.bool_)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for word in rounds:
            key_here = np.broadcast_to(word, values.shape)[outside]
            left, right = right, left ^ (mix(right + key_here) & mask)
        values[outside] = left << half | right
        outside = values >= size
    return values.astype(np.int64)


class SequenceOrder:
    """The order of the sequences of a run over several sources.

    Each source has its share of every block of `BLOCK` sequences, to within one sequence, and its
    share of any number of blocks, to within a few. Sequences are shuffled within a block; in every
    epoch a source goes through a new permutation of its sequences.
    """

    def __init__(
        self,
        counts: Sequence[int],
        shares: Sequence[float],
        seed: int,
        start: int = 0,
        read: Integers | None = None,
    ) -> None:
        """`counts[s]`: packed sequences of source s; `shares[s]`: its share, in any unit.

        The order holds from the sequence `start` of the run on, before which `read[s]` sequences of
        source s were read. Raises `UserError` for a share that is too small for any run.
        """
        self.counts, self.seed, self.start = np.asarray(counts, np.int64), seed, start
        self._read = np.zeros_like(self.counts) if read is None else read
        self._whole = _apportion(shares, HORIZON)
        for source, quota in enumerate(self._whole):
            if quota == 0 and shares[source]:
                raise UserError(
                    f"the share of corpus.sources.{source} is under 1/{HORIZON:,}; raise it."
                )
        self._shuffled = lru_cache(maxsize=64)(self._shuffle)  # several threads may call it

    def places(self, indices: Integers) -> tuple[Integers, Integers]:
        """(sources, sequences within them) of these sequences of the run."""
        blocks, offsets = np.divmod(indices - self.start, BLOCK)
        sources, nth = np.empty_like(indices), np.empty_like(indices)
        for block in np.unique(blocks):
            here = blocks == block
            of_block, before = self._shuffled(int(block))
            sources[here], nth[here] = of_block[offsets[here]], before[offsets[here]]
        found = np.empty_like(indices)
        for source in np.unique(sources):
            mine = sources == source
            epoch, position = np.divmod(self._read[source] + nth[mine], self.counts[source])
            key = keys(self.seed, int(source), epoch)
            found[mine] = permuted(position, int(self.counts[source]), key)
        return sources, found

    def _shuffle(self, block: int) -> tuple[Integers, Integers]:
        """The sources of a block in order, and each one's number among its source's sequences."""
        before, quota = self.quotas(block)
        begin = (self.start,) if self.start else ()
        order = np.argsort(keys(self.seed, -1, *begin, block, np.arange(BLOCK)), kind="stable")
        sources = np.repeat(np.arange(len(quota)), quota)
        nth = np.concatenate(
            [first + np.arange(many) for first, many in zip(before, quota, strict=True)]
        )
        shuffled = sources[order]
        by_source = np.argsort(shuffled, kind="stable")
        counted = np.empty(BLOCK, np.int64)
        counted[by_source] = nth  # `nth` is ordered by source and increases within each
        return shuffled, counted

    def read_before(self, index: int) -> Integers:
        """How many sequences of each source are read before this sequence of the run."""
        block, offset = divmod(index - self.start, BLOCK)
        here, _ = self._shuffled(block)
        before, _ = self.quotas(block)
        return self._read + before + np.bincount(here[:offset], minlength=len(before))

    def quotas(self, block: int) -> tuple[Integers, Integers]:
        """(sequences of each source before the block, sequences of each source in it).

        The sequences of the horizon are halved repeatedly, towards the block. Sources with an odd
        number put the odd sequence into the left and the right half alternately, so that every half
        is full and has the share of each source to within one sequence.
        """
        if not 0 <= block < 1 << LEVELS:
            raise UserError(f"a run has at most {HORIZON:,} sequences; lower training.tokens.")
        here, before = self._whole, np.zeros(len(self._whole), np.int64)
        for level in reversed(range(LEVELS)):
            odd = here & 1
            turn = int(keys(self.seed, -2, level, block >> (level + 1))[0] & np.uint64(1))
            left = here // 2 + odd * ((np.cumsum(odd) + turn) & 1)
            if (block >> level) & 1:
                here, before = here - left, before + left
            else:
                here = left
        return before, here


class ChangingOrder:
    """The order of a run whose shares change at some sequences.

    Before a change nothing depends on it, and each source continues in its epoch where it was.
    """

    def __init__(
        self, counts: Sequence[int], changes: Sequence[tuple[int, Sequence[float]]], seed: int
    ) -> None:
        """`changes`: from which sequence on, and the shares; the first one is from 0 on."""
        self.counts = np.asarray(counts, np.int64)
        self._orders = list[SequenceOrder]()
        for start, shares in changes:
            read = self._orders[-1].read_before(start) if self._orders else None
            self._orders.append(SequenceOrder(counts, shares, seed, start, read))

    def places(self, indices: Integers) -> tuple[Integers, Integers]:
        """As `SequenceOrder.places`."""
        starts = [order.start for order in self._orders]
        orders = np.searchsorted(starts, indices, side="right") - 1
        sources, found = np.empty_like(indices), np.empty_like(indices)
        for number in np.unique(orders):
            mine = orders == number
            sources[mine], found[mine] = self._orders[number].places(indices[mine])
        return sources, found


def same_order(shares: Sequence[float], others: Sequence[float]) -> bool:
    """Whether runs with these shares of the same sources read the same sequences."""
    return np.array_equal(_apportion(shares, HORIZON), _apportion(others, HORIZON))


def _apportion(shares: Sequence[float], total: int) -> Integers:
    """Whole numbers with these shares and this sum, by the largest-remainder method."""
    exact = np.asarray(shares, np.float64) / sum(shares) * total
    quota = np.floor(exact).astype(np.int64)
    for source in np.argsort(quota - exact, kind="stable")[: total - int(quota.sum())]:
        quota[source] += 1
    return quota
