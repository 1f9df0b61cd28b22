"""How the text is divided over processes and nodes, and how much of its share a process has read.

The text is laid out on the line from 0 to 1: each piece (a file) takes a length in proportion to
its size, and every process has an interval of that line. Block number b of a piece is at the start
of the piece plus frac(b * golden ratio) of its length, which spreads the blocks evenly. A process
reads the pieces that its interval meets and tokenises the blocks inside it. So a corpus of many
files is divided by files and a single file by blocks; the cost is that processes read blocks that
they do not tokenise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from cpt_merge.core.world import World

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Interval:
    """The part [start, end) of the line that belongs to one process."""

    start: float
    end: float

    @staticmethod
    def of(world: World, worker: int, workers: int) -> Interval:
        """The interval of a worker; nodes may have different numbers of `workers`."""
        last = worker + 1 == workers and world.rank + 1 == world.size
        ends = [(world.rank + number / workers) / world.size for number in (worker, worker + 1)]
        return Interval(ends[0], 2.0 if last else ends[1])  # what rounds to 1 is in the last

    def __contains__(self, position: float) -> bool:
        return self.start <= position < self.end


@dataclass(frozen=True)
class Line:
    """The pieces on the line from 0 to 1."""

    sizes: Sequence[int]  # bytes
    starts: Sequence[float]  # of each piece, and of the end of the last one, which is 1

    @staticmethod
    def of(sizes: Sequence[int]) -> Line:
        """The line of pieces of these sizes."""
        ends, whole = list(accumulate(sizes)), sum(sizes)
        return Line(sizes, [0.0, *(end / whole for end in ends)])

    def position(self, piece: int, block: int) -> float:
        """Where a block is."""
        within = (block + 0.5) * GOLDEN % 1
        return self.starts[piece] + within * (self.starts[piece + 1] - self.starts[piece])

    def bytes_in(self, interval: Interval, piece: int) -> float:
        """How much of a piece belongs to an interval."""
        start, end = self.starts[piece : piece + 2]
        shared = min(end, interval.end) - max(start, interval.start)
        return max(shared, 0.0) / (end - start) * self.sizes[piece]


@dataclass
class Reading:
    """How much of its part of a piece a process has read, judged by the text that it has seen."""

    whole: float  # bytes of the piece that belong to the process
    text: float  # about how many bytes of text the piece contains
    done: float = 0.0  # of `whole`

    def advance(self, text: int) -> float:
        """The bytes that `text` more bytes of text stand for."""
        before = self.done
        self.done = min(before + text / max(self.text, 1.0) * self.whole, self.whole)
        return self.done - before

    def finish(self) -> float:
        """The bytes that are left at the end of the piece."""
        left, self.done = self.whole - self.done, self.whole
        return left
