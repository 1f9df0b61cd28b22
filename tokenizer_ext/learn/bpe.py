"""Continued byte-pair encoding: keep merging where a tokenizer's own merges end.

The algorithm is that of Sennrich et al. (2016): the most frequent pair of neighbours becomes a
piece, again and again.

A string is merged in the same order wherever it occurs, as long as no merge crosses its ends. Three
things follow:

- Two neighbours that spell a string are the same two everywhere. Pairs can therefore be counted by
  their halves, although SentencePiece merges any two neighbours whose concatenation is a piece
  (bpe_model.cc).
- A piece that is found here is reachable: encoded alone, it results from the same merges.
- All occurrences of a pair arise in one step, and then become fewer. A pair that is rare when it
  arises is never counted, and no piece crosses a pair that is rare at the start.

Pieces of the tokenizer that its own merges do not reach (LLaMA-3 has 588) stay unreachable: their
strings are no candidates.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cpt_merge.core.progress import Meter, timed
from cpt_merge.tokenizer_ext.families.tokenizer_json import Merge
from cpt_merge.tokenizer_ext.learn.symbols import (
    Ints,
    Places,
    Symbols,
    WordArrays,
    pair_keys,
    split_key,
    sum_by_key,
)


@dataclass(frozen=True)
class Growth:
    """The learnt pieces in the order of their merges, and their effect on the counted words."""

    pieces: dict[str, Merge]  # piece -> the two that it is merged from
    usage: dict[str, int]  # token -> its frequency in the text after all merges


class ContinuedBpe:
    """Learns pieces beyond those of a vocabulary.

    `names[id]` is a piece of the vocabulary, or "" for an unused id. `words` are split as its
    tokenizer splits them, and are consumed. `admits` tells whether a string may become a piece; a
    candidate must occur `min_frequency` times.
    """

    def __init__(
        self,
        names: Sequence[str],
        words: WordArrays,
        admits: Callable[[str], bool],
        min_frequency: int,
    ) -> None:
        self._names = list(names)
        self._ids = {name: id_ for id_, name in enumerate(self._names)}
        self._admits = admits
        self._min_frequency = min_frequency
        self._counts: dict[int, int] = {}  # candidate pair -> frequency
        # (-count, string, pair); a count may have fallen since its entry was added
        self._heap: list[tuple[int, str, int]] = []
        self._symbols = Symbols(words)

    def learn(self, size: int, label: str = "learning") -> Growth:
        """Learn up to `size` pieces, fewer if no candidate is left.

        `label` names the progress display.
        """
        pieces: dict[str, Merge] = {}
        with timed(f"{label}: counting pairs"):
            self._count_pairs()
        with Meter(label, size, "pieces") as meter:
            while len(pieces) < size and (pair := self._pop_best()) is not None:
                left, right = (self._names[id_] for id_ in split_key(pair))
                pieces[left + right] = left, right
                self._merge_everywhere(pair)
                meter.advance()
        usage = self._symbols.usage(len(self._names))
        return Growth(
            pieces, {self._names[id_]: int(usage[id_]) for id_ in np.flatnonzero(usage).tolist()}
        )

    def _count_pairs(self) -> None:
        """Count all pairs, and divide the words at rare ones."""
        keys, counts = self._symbols.count_pairs()
        kept = counts >= self._min_frequency
        self._symbols.keep_together(keys[kept])
        self._symbols.index(len(self._names))
        self._gain(keys[kept], counts[kept])

    def _pop_best(self) -> int | None:
        """The most frequent candidate; of equal ones, the first by code points.

        Entries with old counts are put back.
        """
        while self._heap:
            negative, text, pair = heapq.heappop(self._heap)
            count = self._counts.get(pair, 0)
            if count == -negative:
                return pair
            if count >= self._min_frequency:
                heapq.heappush(self._heap, (-count, text, pair))
        return None

    def _merge_everywhere(self, pair: int) -> None:
        """Make a piece of the pair."""
        left, right = split_key(pair)
        piece = len(self._names)
        self._names.append(self._names[left] + self._names[right])
        self._ids[self._names[piece]] = piece
        del self._counts[pair]
        places = self._symbols.places(left, right)
        self._merge_at_once(_without_overlaps(places, self._symbols.following(places)), piece)

    def _merge_at_once(self, places: Places, piece: int) -> None:
        """Merge each symbol at `places` with the following one."""
        symbols = self._symbols
        gone = symbols.following(places)
        before, after = symbols.preceding(places), symbols.following(gone)
        # The others directly follow a merged pair, which counts the border between them.
        first = np.ones(len(places), bool)
        first[1:] = places[1:] != after[:-1]
        weights = symbols.weight[places]
        both = np.concatenate([weights[first], weights])
        self._lose(*self._pairs_at([before[first], gone], [places[first], after], both))
        symbols.merge(places, piece)
        self._gain(*self._pairs_at([before[first], places], [places[first], after], both))

    def _pairs_at(
        self, left: Sequence[Places], right: Sequence[Places], weights: Ints
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(pairs, frequencies) of the symbols at `left` and `right`, without BREAKs."""
        left_, right_ = (self._symbols.symbol[np.concatenate(places)] for places in (left, right))
        within = (left_ >= 0) & (right_ >= 0)
        return sum_by_key(pair_keys(left_[within], right_[within]), weights[within])

    def _lose(self, pairs: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Reduce the counts of candidates."""
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            if pair in self._counts:
                self._counts[pair] -= count

    def _gain(self, pairs: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Make candidates of the pairs that are frequent enough and admitted."""
        frequent = counts >= self._min_frequency
        for pair, count in zip(pairs[frequent].tolist(), counts[frequent].tolist(), strict=True):
            left, right = split_key(pair)
            text = self._names[left] + self._names[right]
            if text not in self._ids and self._admits(text):
                self._counts[pair] = count
                heapq.heappush(self._heap, (-count, text, pair))


def _without_overlaps(places: Places, behind: Places) -> Places:
    """Of pairs that share a symbol (`aaa`), every second from the left, as with one merge after
    another.

    `behind` are the places of the right halves.
    """
    shared = np.zeros(len(places), bool)
    shared[1:] = behind[:-1] == places[1:]
    if not shared.any():
        return places
    numbers = np.arange(len(places))
    chain_start = np.maximum.accumulate(np.where(shared, 0, numbers))
    first_of_two: Places = places[(numbers - chain_start) % 2 == 0]
    return first_of_two
