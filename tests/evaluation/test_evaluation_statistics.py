"""Bootstrap intervals, of one metric and of the difference between two models."""

import math

import numpy as np
import pytest

from cpt_merge.evaluation.statistics import difference, estimate, tail_of


def parts(values):
    return {unit: (value, 1.0) for unit, value in enumerate(values)}


def test_bootstrap_agrees_with_theory_and_is_seeded():
    values = (np.random.default_rng(0).random(400) < 0.3).astype(float)
    found = estimate(parts(values), seed=1)
    error = math.sqrt(found.value * (1 - found.value) / 400)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert estimate(parts(values), seed=1) == found != estimate(parts(values), seed=2)
    assert estimate({0: (2.0, 1.0), 1: (6.0, 3.0)}, seed=0).value == 2.0


def test_the_paired_interval_is_narrower_where_models_fail_at_the_same_prompts():
    random = np.random.default_rng(0)
    easy = random.random(200) < 0.5
    base = parts(easy.astype(float))
    better = parts(
        np.where(random.random(200) < 0.1, 1.0, easy)
    )  # the same prompts, and a few more
    found = difference(better, base, seed=0)
    assert found is not None
    assert found.beyond
    alone = [estimate(one, seed=0) for one in (base, better)]
    assert found.high - found.low < 0.5 * sum(one.high - one.low for one in alone)
    assert alone[0].high > alone[1].low, "the two intervals alone would not have told them apart"


def test_no_difference_is_not_beyond_and_only_common_units_count():
    same = parts([1.0, 0.0, 1.0])
    found = difference(same, same, seed=0)
    assert (found.value, found.low, found.high, found.beyond) == (0, 0, 0, False)
    assert difference({0: (1.0, 1.0), 7: (1.0, 1.0)}, {0: (0.0, 1.0), 8: (1.0, 1.0)}, seed=0).n == 1
    assert difference({0: (1.0, 1.0)}, {1: (1.0, 1.0)}, seed=0) is None


def test_few_units_have_wider_intervals():
    """They are as wide as Student's t demands: about 5 of 100 miss the truth, also for few units."""
    assert [round(tail_of(n), 4) for n in (3, 8, 30, 100_000)] == [0.0, 0.0057, 0.0188, 0.025]
    random = np.random.default_rng(0)
    for n in (7, 12, 30):
        found = [estimate(parts(values), seed=0) for values in random.normal(size=(400, n))]
        missed = sum(not one.low <= 0 <= one.high for one in found) / len(found)
        assert missed < 0.08, (n, missed)


def test_fewer_than_four_units_are_never_a_significant_difference():
    for n, beyond in ((1, False), (3, False), (4, True)):
        found = difference(parts([1.0] * n), parts([0.5] * n), seed=0)
        assert found is not None
        assert found.beyond == beyond
