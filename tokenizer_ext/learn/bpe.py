"""Continued byte-pair encoding: go on merging where a tokenizer's own merges end.

The plain algorithm (Sennrich et al., 2016): again and again the most frequent pair of neighbours becomes a piece.

What lies within a string is merged in the same order wherever the string stands, as long as no merge reaches across its
ends. Three things follow:

- Two neighbours that spell a string are the same two everywhere. So pairs can be counted by their halves, although
  SentencePiece merges any two neighbours whose concatenation is a piece (bpe_model.cc).
- A piece that is found here is reachable: encoded alone, it is spelt by the same merges.
- All occurrences of a pair come about in one step, and after that they only become fewer. A pair that is rare then is
  never counted, and no piece reaches across a pair that is rare at the start.

The tokenizer's own pieces that its merges do not lead to (LLaMA-3 has 588) stay so: their strings are no candidates.
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
    """The pieces that were found, the first merged first, and what they do to the counted words."""

    pieces: dict[str, Merge]  # piece -> the two that it is merged from
    usage: dict[str, int]  # token -> how often it stands in the text when all merging is done


class ContinuedBpe:
    """Learns pieces beyond a vocabulary's own.

    `names[id]` is a piece of it, "" where there is none. `words` are as its tokenizer splits them now, and are used up.
    `admits` says whether a string may become a piece.
    A candidate must occur `min_frequency` times.
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
        self._counts: dict[int, int] = {}  # pair that may become a piece -> how often it occurs
        self._heap: list[
            tuple[int, str, int]
        ] = []  # (-count, string, pair); counts may have fallen since
        self._symbols = Symbols(words)

    def learn(self, size: int, label: str = "learning") -> Growth:
        """Up to `size` pieces; fewer where no candidate is left. Progress is shown as `label`."""
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
        """Count all pairs, and part the words where a rare one stands."""
        keys, counts = self._symbols.count_pairs()
        kept = counts >= self._min_frequency
        self._symbols.keep_together(keys[kept])
        self._symbols.index(len(self._names))
        self._gain(keys[kept], counts[kept])

    def _pop_best(self) -> int | None:
        """The most frequent candidate, the first in code point order among equals. Counts that fell are put back."""
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
        """Merge each symbol at `places` with the one behind it."""
        symbols = self._symbols
        gone = symbols.following(places)
        before, after = symbols.preceding(places), symbols.following(gone)
        first = np.ones(
            len(places), bool
        )  # the others stand right behind a merged pair, which counts that border
        first[1:] = places[1:] != after[:-1]
        weights = symbols.weight[places]
        both = np.concatenate([weights[first], weights])
        self._lose(*self._pairs_at([before[first], gone], [places[first], after], both))
        symbols.merge(places, piece)
        self._gain(*self._pairs_at([before[first], places], [places[first], after], both))

    def _pairs_at(
        self, left: Sequence[Places], right: Sequence[Places], weights: Ints
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(pairs, how often) of the symbols at `left` and `right`, BREAKs left out."""
        left_, right_ = (self._symbols.symbol[np.concatenate(places)] for places in (left, right))
        within = (left_ >= 0) & (right_ >= 0)
        return sum_by_key(pair_keys(left_[within], right_[within]), weights[within])

    def _lose(self, pairs: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Count pairs down; those that were rare are not counted."""
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            if pair in self._counts:
                self._counts[pair] -= count

    def _gain(self, pairs: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Make candidates of pairs that are frequent enough and admitted."""
        frequent = counts >= self._min_frequency
        for pair, count in zip(pairs[frequent].tolist(), counts[frequent].tolist(), strict=True):
            left, right = split_key(pair)
            text = self._names[left] + self._names[right]
            if text not in self._ids and self._admits(text):
                self._counts[pair] = count
                heapq.heappush(self._heap, (-count, text, pair))


def _without_overlaps(places: Places, behind: Places) -> Places:
    """Of pairs that share a symbol (`aaa`), every second from the left, as merging in turn leaves them.

    `behind` is where the right halves begin.
    """
    shared = np.zeros(len(places), bool)
    shared[1:] = behind[:-1] == places[1:]
    if not shared.any():
        return places
    numbers = np.arange(len(places))
    chain_start = np.maximum.accumulate(np.where(shared, 0, numbers))
    first_of_two: Places = places[(numbers - chain_start) % 2 == 0]
    return first_of_two
