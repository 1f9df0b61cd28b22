"""The order of sequences is a function of (seed, index), with exact shares and whole epochs."""

from collections import Counter
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest

from cpt_merge.core.errors import UserError
from cpt_merge.data.order import BLOCK, HORIZON, ChangingOrder, SequenceOrder, keys, permuted


def places(order: SequenceOrder, start: int, stop: int) -> list[tuple[int, int]]:
    sources, numbers = order.places(np.arange(start, stop))
    return list(zip(sources.tolist(), numbers.tolist(), strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_permuted_visits_every_index_once(size: int) -> None:
    assert sorted(permuted(np.arange(size), size, keys(1)).tolist()) == list(range(size))


def test_a_permutation_is_named_by_its_key() -> None:
    def first(key: npt.NDArray[np.uint64]) -> list[int]:
        return permuted(np.arange(100), 100, key).tolist()  # type: ignore[no-any-return]

    assert first(keys(1, 2, 3)) != first(keys(1, 2, 4))
    assert first(keys(1, 2, 3)) != first(keys(2, 2, 3))
    mixed = permuted(np.arange(100), 100, np.where(np.arange(100) % 2, keys(1), keys(2)))
    assert mixed.tolist()[::2] == first(keys(2))[::2]
    assert mixed.tolist()[1::2] == first(keys(1))[1::2]


def test_permuted_looks_random() -> None:
    """Over 2,000 permutations of 50, every element is in every place about 40 times."""
    index, seeds = np.tile(np.arange(50), 2000), np.repeat(np.arange(2000), 50)
    counts = np.zeros((50, 50))  # chi squared with 2,401 degrees of freedom
    np.add.at(counts, (index, permuted(index, 50, keys(0, seeds))), 1)
    assert 2401 - 5 * 69 < ((counts - 40) ** 2 / 40).sum() < 2401 + 5 * 69


def test_a_place_does_not_depend_on_what_was_asked_before_or_with_it() -> None:
    forwards = places(SequenceOrder([50, 70], [3.0, 1.0], seed=1), 0, 2500)
    again = SequenceOrder([50, 70], [3.0, 1.0], seed=1)
    assert [places(again, i, i + 1)[0] for i in reversed(range(2500))] == forwards[::-1]
    odd = again.places(np.arange(1, 2500, 2))
    assert list(zip(*(values.tolist() for values in odd), strict=True)) == forwards[1::2]


def test_shares_are_exact_to_a_row_in_every_block() -> None:
    order = SequenceOrder([50, 70, 9], [0.7, 0.2, 0.1], seed=3)
    for block in (0, 1, 7, 12345):
        counts = Counter(source for source, _ in places(order, block * BLOCK, (block + 1) * BLOCK))
        assert sum(counts.values()) == BLOCK
        for source, share in enumerate((0.7, 0.2, 0.1)):
            assert abs(counts[source] - share * BLOCK) < 1


def test_shares_are_exact_to_a_few_rows_over_the_run_however_small() -> None:
    shares = np.asarray([0.9, 0.09999, 0.00001])
    order = SequenceOrder([50, 70, 9], shares.tolist(), seed=3)
    found = [order.quotas(block) for block in range(500)]
    for (before, quota), (after, _) in pairwise(found):
        assert (before + quota == after).all()
        assert quota.sum() == BLOCK
        assert quota.min() >= 0
    for block, (before, _) in enumerate(found):
        assert np.abs(before - shares * block * BLOCK).max() < 5


def test_a_source_gives_each_row_once_per_epoch() -> None:
    order = SequenceOrder([40, 60], [1.0, 1.0], seed=5)
    rows = [row for source, row in places(order, 0, 3 * BLOCK) if source == 0]
    assert len(rows) > 1500
    for epoch in range(37):
        assert sorted(rows[epoch * 40 : (epoch + 1) * 40]) == list(range(40))
    assert rows[:40] != rows[40:80]


def test_seeds_give_different_orders() -> None:
    assert places(SequenceOrder([1000], [1.0], 1), 0, 50) != places(
        SequenceOrder([1000], [1.0], 2), 0, 50
    )


def test_a_share_too_small_to_be_seen_and_a_run_too_long_are_refused() -> None:
    with pytest.raises(UserError, match=r"corpus.sources.1 is under 1/"):
        SequenceOrder([10, 10], [1.0, 1e-14], seed=0)
    with pytest.raises(UserError, match="a run has at most"):
        SequenceOrder([10], [1.0], seed=0).places(np.asarray([HORIZON]))


def test_a_change_of_shares_changes_nothing_before_it_and_continues_the_epochs() -> None:
    counts, change = [500, 700, 90], 1500  # within a block
    plain = SequenceOrder(counts, [0.7, 0.2, 0.1], seed=3)
    changing = ChangingOrder(counts, [(0, [0.7, 0.2, 0.1]), (change, [0.0, 0.5, 0.5])], seed=3)
    everything = changing.places(np.arange(4000))
    before = plain.places(np.arange(change))
    for found, expected in zip(everything, before, strict=True):
        assert np.array_equal(found[:change], expected)
    later = Counter(everything[0][change : change + BLOCK].tolist())
    assert set(later) == {1, 2}, "a source without a share is not read"
    assert abs(later[1] - BLOCK / 2) <= 1
    for source, count in enumerate(counts):
        read = everything[1][everything[0] == source]
        for epoch in range(len(read) // count):
            of_epoch = read[epoch * count : (epoch + 1) * count]
            assert len(set(of_epoch.tolist())) == count, "an epoch reads each sequence once"
    alone = [changing.places(np.asarray([i])) for i in range(change - 3, change + 3)]
    assert [int(numbers[0]) for _, numbers in alone] == everything[1][
        change - 3 : change + 3
    ].tolist()
