"""Continued byte-pair encoding: go on merging where a tokenizer's own merges end.

The plain algorithm (Sennrich et al., 2016) with one change: a pair is known by the string it spells, not by its two
halves, because that is how SentencePiece merges (bpe_model.cc): any two neighbours whose concatenation is a piece.
So every way of splitting a new piece in two counts towards it, and later becomes a merge.

A piece that is found here is reachable: it was spelt, within some word, by merges that all lie inside it, and the same
merges happen in the same order when it is encoded alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

BREAK = ""  # stands between words, and wherever no piece may reach across


@dataclass(frozen=True)
class Growth:
    """The pieces that were found, the first merged first, and what they do to the counted words."""

    pieces: list[str]
    saved: list[int]  # tokens that each piece saves, in the order of `pieces`
    used: int  # pieces that are still seen when all merging is done; the others are only steps on the way


class ContinuedBpe:
    """Words as one flat list of symbols, doubly linked so that a merge costs the same wherever it happens.

    `merges` and `vocabulary` are the tokenizer's so far; `admits` says whether a string may become a piece.
    """

    def __init__(
        self, merges: Sequence[tuple[str, str]], vocabulary: Iterable[str], admits: Callable[[str], bool]
    ) -> None:
        self._rank = dict.fromkeys(vocabulary, len(merges))  # piece -> its place in the order of merging
        self._rank.update((left + right, rank) for rank, (left, right) in reversed(list(enumerate(merges))))
        self._merges = set(merges)
        self._admits = admits
        self._new: set[str] = set()
        self._symbols: list[str] = [BREAK]  # a symbol that was merged into its left neighbour is BREAK as well
        self._weights: list[int] = [0]  # how often the word of each symbol occurs
        self._next: list[int] = []
        self._previous: list[int] = []
        self._count: dict[str, int] = {}  # candidate -> how often it is spelt by two neighbours
        self._places: dict[str, list[int]] = {}  # candidate -> where its left half was at some time
        self._grown: set[str] = set()  # candidates whose count has risen since they were last put on the heap
        self._saved = 0

    def add(self, symbols: Iterable[str], weight: int) -> None:
        """A word as the tokenizer splits it now, and how often it occurs. BREAK may stand among the symbols."""
        self._symbols.extend(symbols)
        self._symbols.append(BREAK)
        self._weights.extend([weight] * (len(self._symbols) - len(self._weights)))

    def learn(self, size: int, min_frequency: int) -> Growth:
        """Up to `size` pieces; fewer where no candidate occurs `min_frequency` times."""
        self._count_pairs()
        pieces: list[str] = []
        saved: list[int] = []
        heap: list[tuple[int, str]] = []
        while len(pieces) < size:
            self._push_grown(heap, min_frequency)
            piece = self._pop_best(heap, min_frequency)
            if piece is None:
                break
            pieces.append(piece)
            saved.append(self._merge_everywhere(piece))
        return Growth(pieces, saved, len(self._new.intersection(self._symbols)))

    def _count_pairs(self) -> None:
        last = len(self._symbols) - 1
        self._next = [*range(1, last + 1), last]
        self._previous = [0, *range(last)]
        for place in range(last):
            if self._symbols[place] and self._symbols[place + 1]:
                self._gain(place)

    def _push_grown(self, heap: list[tuple[int, str]], min_frequency: int) -> None:
        for text in self._grown:
            count = self._count.get(text, 0)
            if count >= min_frequency:
                heapq.heappush(heap, (-count, text))
        self._grown.clear()

    def _pop_best(self, heap: list[tuple[int, str]], min_frequency: int) -> str | None:
        """The most frequent candidate, the first in code point order among equals. Counts that fell are put back."""
        while heap:
            negative, text = heapq.heappop(heap)
            count = self._count.get(text, 0)
            if count == -negative:
                return text
            if min_frequency <= count < -negative:
                heapq.heappush(heap, (-count, text))
        return None

    def _merge_everywhere(self, piece: str) -> int:
        """Make `piece` a piece. Returns how many tokens that saves."""
        saved = self._saved
        places = sorted(self._places.pop(piece))
        del self._count[piece]
        self._rank[piece] = len(self._merges) + len(self._new) + 1
        self._new.add(piece)
        symbols, following = self._symbols, self._next
        for place in places:
            left, right = symbols[place], symbols[following[place]]
            if left and right and left + right == piece and self._merge(place):
                self._settle(place)
        return self._saved - saved

    def _merge(self, place: int) -> bool:
        """Merge a symbol with its right neighbour. True if the result, with a neighbour, spells an existing piece."""
        symbols = self._symbols
        gone = self._next[place]
        before, after = self._previous[place], self._next[gone]
        weight = self._weights[place]
        if symbols[before]:
            self._lose(symbols[before] + symbols[place], weight)
        if symbols[after]:
            self._lose(symbols[gone] + symbols[after], weight)
        symbols[place] += symbols[gone]
        symbols[gone] = BREAK
        self._next[place] = after
        self._previous[after] = place
        self._saved += weight
        met = symbols[before] != BREAK and self._gain(before)
        return (symbols[after] != BREAK and self._gain(place)) or met

    def _gain(self, place: int) -> bool:
        """Count the pair that begins at `place`. True if it spells an existing piece."""
        text = self._symbols[place] + self._symbols[self._next[place]]
        count = self._count.get(text)
        if count is not None:
            self._count[text] = count + self._weights[place]
            self._places[text].append(place)
        elif text in self._rank:
            return True
        elif self._admits(text):
            self._count[text] = self._weights[place]
            self._places[text] = [place]
        else:
            return False
        self._grown.add(text)
        return False

    def _lose(self, text: str, weight: int) -> None:
        count = self._count.get(text)
        if count is not None:
            self._count[text] = count - weight

    def _settle(self, place: int) -> None:
        """Let a fresh symbol merge on into existing pieces: their merges come before all that is yet to be learnt."""
        while True:
            joining = [left for left in (self._previous[place], place) if self._joins(left)]
            if not joining:
                return
            place = min(joining, key=lambda left: self._rank[self._symbols[left] + self._symbols[self._next[left]]])
            self._merge(place)

    def _joins(self, place: int) -> bool:
        """Whether the tokenizer merges the pair at `place`: its own merge, or one that a new piece takes part in."""
        left, right = self._symbols[place], self._symbols[self._next[place]]
        if not left or not right or left + right not in self._rank:
            return False
        return bool(self._new & {left, right, left + right}) or (left, right) in self._merges
