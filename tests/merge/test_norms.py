"""Norms and cosines from a sample of every tensor."""

import numpy as np
import pytest

from cpt_merge.merge.norms import PERIOD, WINDOW, Sums, sampled_rows, total, windows

SIZE = 3 * PERIOD + 1000


def positions(start: int, count: int) -> list[int]:
    return [start + at for part in windows(start, count) for at in range(*part.indices(count))]


@pytest.mark.parametrize("step", [SIZE, PERIOD, PERIOD // 3 + 7, WINDOW // 2 + 1])
def test_the_sample_does_not_depend_on_how_a_tensor_is_cut(step):
    parts = [positions(start, min(step, SIZE - start)) for start in range(0, SIZE, step)]
    expected = [at for at in range(SIZE) if at % PERIOD < WINDOW]
    assert [at for part in parts for at in part] == expected


def test_the_first_elements_of_every_tensor_are_in_the_sample():
    assert positions(0, 5) == [0, 1, 2, 3, 4]
    assert sampled_rows(np.arange(2), 1 << 20)[0]


@pytest.mark.parametrize("width", [64, 4096, 5120, WINDOW])
def test_about_one_row_in_sixteen_is_in_the_sample(width):
    assert sampled_rows(np.arange(200_000), width).mean() == pytest.approx(1 / 16, rel=0.05)


def test_sums_of_a_sample_stand_for_all_elements():
    values = np.ones(10, np.float32)
    sums = Sums(elements=160)
    sums.count(2 * values, values, values)
    whole = total([sums, sums])
    assert (whole.base, whole.vector, whole.elements) == (320, 320, 320)
    assert (whole.vector_share, whole.contained) == (1, 1)
