"""Which process reads and tokenises what, and how far it is."""

from __future__ import annotations

import random

import numpy as np
import pytest

from cpt_merge.core.world import World
from cpt_merge.data.division import Interval, Line, Reading


def intervals(counts: list[int]) -> list[Interval]:
    """Of the workers of nodes with so many workers each."""
    return [
        Interval.of(World(rank, len(counts)), worker, count)
        for rank, count in enumerate(counts)
        for worker in range(count)
    ]


def test_every_position_belongs_to_one_process() -> None:
    divided = intervals([1, 4, 3])
    generator = random.Random(0)
    positions = [0.0, 1.0, *(i.start for i in divided), *(generator.random() for _ in range(1000))]
    assert all(sum(position in one for one in divided) == 1 for position in positions)


def test_a_single_file_is_divided_evenly_by_blocks() -> None:
    line = Line.of([300, 1000, 700])
    mine = [line.position(1, block) for block in range(1000)]
    assert line.starts[1] <= min(mine) < max(mine) < line.starts[2]
    counts = np.histogram(mine, bins=8, range=(line.starts[1], line.starts[2]))[0]
    assert counts.min() > 120


def test_all_bytes_are_read_by_someone_and_only_once_in_sum() -> None:
    line = Line.of([300, 1, 7_000, 70])
    divided = intervals([1, 4, 3])
    for piece, size in enumerate(line.sizes):
        assert sum(line.bytes_in(one, piece) for one in divided) == pytest.approx(size)
    assert line.bytes_in(divided[0], 3) == 0.0


def test_reading_ends_at_the_whole_whatever_was_expected() -> None:
    for expected in (0.0, 10.0, 90.0, 1e6):
        reading = Reading(50.0, expected)
        steps = [reading.advance(30) for _ in range(3)]
        assert all(step >= 0 for step in steps)
        assert sum(steps) + reading.finish() == pytest.approx(50.0)
    reading = Reading(50.0, 90.0)
    assert reading.advance(30) == pytest.approx(50 / 3)
