"""The order of rows is a pure function of (seed, index), with exact shares and whole epochs."""

from collections import Counter

import pytest

from core.errors import UserError
from training.order import BLOCK, RowOrder, permuted


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_permuted_visits_every_index_once(size: int) -> None:
    assert sorted(permuted(i, size, "seed") for i in range(size)) == list(range(size))


def test_permutations_of_two_seeds_differ() -> None:
    assert [permuted(i, 100, "a") for i in range(100)] != [permuted(i, 100, "b") for i in range(100)]


def test_a_place_does_not_depend_on_what_was_asked_before() -> None:
    order = RowOrder([50, 70], [3.0, 1.0], seed=1)
    forwards = [order.place(i) for i in range(2500)]
    again = RowOrder([50, 70], [3.0, 1.0], seed=1)
    assert [again.place(i) for i in reversed(range(2500))] == forwards[::-1]


def test_shares_are_exact_in_every_block() -> None:
    order = RowOrder([50, 70, 9], [0.7, 0.2, 0.1], seed=3)
    counts = Counter(order.place(i).source for i in range(BLOCK, 2 * BLOCK))
    assert counts == {0: 700, 1: 200, 2: 100}


def test_a_source_gives_each_row_once_per_epoch() -> None:
    order = RowOrder([40, 60], [1.0, 1.0], seed=5)
    rows = [place.row for place in map(order.place, range(3 * BLOCK)) if place.source == 0]
    for epoch in range(5):
        assert sorted(rows[epoch * 40 : (epoch + 1) * 40]) == list(range(40))
    assert rows[:40] != rows[40:80]


def test_seeds_give_different_orders() -> None:
    first, second = (RowOrder([1000], [1.0], seed).place for seed in (1, 2))
    assert [first(i) for i in range(50)] != [second(i) for i in range(50)]


def test_a_weight_too_small_to_be_seen_is_refused() -> None:
    with pytest.raises(UserError, match=r"corpus.sources.1 is under 1/1000"):
        RowOrder([10, 10], [1.0, 0.0001], seed=0)
