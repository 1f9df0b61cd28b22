"""Many words as flat arrays of symbols, so that pairs are found, counted and merged by the
thousand.

    slot      0  1  2  3  4  5  6
    symbol    |  a  b  .  |  a  |         "a bc |", "a |": `bc` was merged and covers two slots
    span      1  1  2  2  1  1  1

A slot holds the symbol that begins there, BREAK between words, or INSIDE within a longer symbol.
`span` is a symbol's length in slots, stored at its first and its last slot, so that both neighbours
are found without a search. A slot takes 13 bytes, 4 of them for the places of each symbol. A span
is one byte, so a piece has at most 255 slots; `max_piece_length` guarantees this (50 characters of
4 bytes and a space).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

BREAK, INSIDE = -1, -2
BLOCK = 1 << 18  # slots that are counted or sorted at once

Ints = NDArray[np.integer]
Places = NDArray[np.int64]


def pair_keys(left: Ints, right: Ints) -> NDArray[np.int64]:
    """Pairs of symbols as one number each."""
    return (left.astype(np.int64) << 32) | right


def split_key(key: int) -> tuple[int, int]:
    """The pair of a number from `pair_keys`."""
    return key >> 32, key & 0xFFFFFFFF


def sum_by_key(
    keys: NDArray[np.int64], weights: Ints
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(distinct keys, sum of the weights of each)."""
    distinct, which = np.unique(keys, return_inverse=True)
    return distinct, np.bincount(which, weights, minlength=len(distinct)).astype(np.int64)


@dataclass
class WordArrays:
    """Collected words: blocks of symbols with a BREAK after each word, and the word's frequency in
    each slot.
    """

    symbols: list[NDArray[np.int32]] = field(default_factory=lambda: [np.array([BREAK], np.int32)])
    weights: list[NDArray[np.int32]] = field(default_factory=lambda: [np.zeros(1, np.int32)])

    def add(self, symbols: NDArray[np.int32], lengths: Ints, frequencies: Ints) -> None:
        """Add a block of words, end to end.

        `lengths` are the words' numbers of symbols, without the BREAK.
        """
        ends = np.cumsum(lengths)
        self.symbols.append(np.insert(symbols, ends, BREAK).astype(np.int32))
        self.weights.append(np.repeat(frequencies, lengths + 1).astype(np.int32))


def _joined(blocks: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    """All blocks as one array; each block is released once it is copied."""
    whole = np.empty(sum(map(len, blocks)), np.int32)
    end = len(whole)
    while blocks:
        block = blocks.pop()
        whole[end - len(block) : end] = block
        end -= len(block)
    return whole


def _with_inserted(
    values: NDArray[np.int32], cuts: Places, new: NDArray[np.int32]
) -> NDArray[np.int32]:
    """`values` with one of `new` before each of the sorted `cuts`.

    `np.insert` alone needs ten times the memory.
    """
    whole = np.empty(len(values) + len(cuts), np.int32)
    for start in range(0, len(values), BLOCK):
        first, last = np.searchsorted(cuts, (start, start + BLOCK))
        block = np.insert(values[start : start + BLOCK], cuts[first:last] - start, new[first:last])
        whole[start + first : start + first + len(block)] = block
    return whole


class Symbols:
    """The words during merging."""

    def __init__(self, words: WordArrays) -> None:
        self.symbol = _joined(words.symbols)
        self.weight = _joined(words.weights)
        self.span = np.ones(len(self.symbol), np.uint8)
        self._places: list[Places] = []

    def keep_together(self, pairs: NDArray[np.int64]) -> None:
        """Insert a BREAK into every pair that is not among the sorted keys `pairs`.

        Only before the first merge.
        """
        pairs = np.append(pairs, np.iinfo(np.int64).max)
        others = [
            left[pairs[np.searchsorted(pairs, keys)] != keys] + 1
            for left, keys, _ in self._adjacent()
        ]
        cuts = np.concatenate(others) if others else np.zeros(0, np.int64)
        self.weight = _with_inserted(self.weight, cuts, self.weight[cuts])
        self.symbol = _with_inserted(self.symbol, cuts, np.full(len(cuts), BREAK, np.int32))
        self.span = np.ones(len(self.symbol), np.uint8)

    def count_pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(keys, frequencies) of all pairs, before the first merge."""
        keys, sums = np.zeros(0, np.int64), np.zeros(0, np.int64)
        for _, part, weights in self._adjacent():
            more, counts = sum_by_key(part, weights)
            keys, sums = sum_by_key(np.concatenate([keys, more]), np.concatenate([sums, counts]))
        return keys, sums

    def _adjacent(self) -> Iterable[tuple[Places, NDArray[np.int64], NDArray[np.int32]]]:
        """(place of the left symbol, key, weight) of the pairs, in blocks."""
        for start in range(0, len(self.symbol) - 1, BLOCK):
            part = self.symbol[start : start + BLOCK + 1]
            left = np.flatnonzero((part[:-1] >= 0) & (part[1:] >= 0))
            yield left + start, pair_keys(part[left], part[left + 1]), self.weight[left + start]

    def index(self, count: int) -> None:
        """Record the places of the symbols `0 .. count - 1`: a counting sort, block by block."""
        totals = np.bincount(self.symbol[self.symbol >= 0], minlength=count)
        ends = np.cumsum(totals)
        places = np.empty(
            ends[-1] if count else 0, np.uint32 if len(self.symbol) < 2**32 else np.int64
        )
        filled = ends - totals
        for start in range(0, len(self.symbol), BLOCK):
            block = self.symbol[start : start + BLOCK]
            order = np.argsort(block, kind="stable")[np.count_nonzero(block < 0) :]
            ordered = block[order]
            here = np.bincount(ordered, minlength=count)
            rank = np.arange(len(ordered)) - np.repeat(np.cumsum(here) - here, here)
            places[filled[ordered] + rank] = order + start
            filled += here
        self._places = np.split(places, ends[:-1])

    def places(self, left: int, right: int) -> Places:
        """Where `left` stands with `right` behind it."""
        if len(self._places[left]) <= len(self._places[right]):
            found = self._live(left)
            holds = self.symbol[self.following(found)] == right
        else:
            found = self.preceding(self._live(right))
            holds = self.symbol[found] == left
        here: Places = found[holds]
        return here

    def _live(self, symbol: int) -> Places:
        """The places that the symbol has not been merged away from since they were noted."""
        noted = self._places[symbol]
        live = noted[self.symbol[noted] == symbol]
        self._places[symbol] = live
        places: Places = live.astype(np.int64)
        return places

    def following(self, places: Places) -> Places:
        """Where the next symbol begins, a BREAK included."""
        following: Places = places + self.span[places]
        return following

    def preceding(self, places: Places) -> Places:
        """Where the symbol before begins, a BREAK included."""
        preceding: Places = places - self.span[places - 1]
        return preceding

    def merge(self, places: Places, symbol: int) -> None:
        """Make one `symbol` of each symbol at `places` (sorted, not adjoining by halves) and the
        one behind it.
        """
        gone = self.following(places)
        span = self.span[places] + self.span[gone]
        self.symbol[places] = symbol
        self.symbol[gone] = INSIDE
        self.span[places] = span
        self.span[places + span - 1] = span
        self.note(symbol, places)

    def note(self, symbol: int, places: Places) -> None:
        """`symbol` now stands at `places` too."""
        if symbol == len(self._places):
            self._places.append(np.zeros(0, self._places[0].dtype))
        self._places[symbol] = np.concatenate(
            [self._places[symbol], places.astype(self._places[0].dtype)]
        )

    def usage(self, count: int) -> NDArray[np.int64]:
        """How often each of the symbols `0 .. count - 1` stands in the text now."""
        totals = np.zeros(count)
        for start in range(0, len(self.symbol), BLOCK):
            block, weight = self.symbol[start : start + BLOCK], self.weight[start : start + BLOCK]
            totals += np.bincount(block[block >= 0], weight[block >= 0], minlength=count)
        return totals.astype(np.int64)
