"""Thinning, election and gate against their definitions, written here in the plainest way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cpt_merge.merge.methods import gate
from cpt_merge.merge.methods.dare import draw_kept, keep_drawn
from cpt_merge.merge.methods.ties import elected_mean, keep_largest, magnitude_threshold

floats = st.floats(-100, 100, width=32)
vectors = arrays(np.float32, st.integers(1, 200), elements=floats)


@settings(deadline=None)
@given(vectors, st.floats(0.01, 1), st.integers(1, 5))
def test_the_threshold_is_the_kth_largest_magnitude(d, density, parts):
    threshold = magnitude_threshold(lambda: np.array_split(d, parts), density)
    wanted = max(int(density * len(d)), 1)
    assert threshold == np.sort(np.abs(d))[::-1][wanted - 1]
    assert (keep_largest(d, threshold) != 0).sum() <= (np.abs(d) >= threshold).sum()


def test_trimming_keeps_the_largest_and_nothing_else():
    d = np.array([0.1, -0.5, 0.3, -0.2], np.float32)
    kept = keep_largest(d, magnitude_threshold(lambda: [d], 0.5))
    assert kept.tolist() == [0, d[1], d[2], 0]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 5000), st.integers(1, 300))
def test_what_is_drawn_for_an_element_does_not_depend_on_its_neighbours(start, count):
    whole = draw_kept(0.4, "0/0/x", 0, 5300)
    assert (draw_kept(0.4, "0/0/x", start, count) == whole[start : start + count]).all()


def test_the_share_that_is_drawn_and_the_mean_that_is_kept():
    d = np.random.default_rng(0).standard_normal(200_000).astype(np.float32) + 1
    kept = draw_kept(0.3, "7/0/x", 0, len(d))
    assert kept.mean() == pytest.approx(0.3, abs=0.005)
    assert keep_drawn(d, kept, 0.3).mean() == pytest.approx(d.mean(), rel=0.02)
    assert (draw_kept(0.3, "8/0/x", 0, len(d)) != kept).any()
    assert draw_kept(1.0, "7/0/x", 0, len(d)).all()


@settings(deadline=None)
@given(arrays(np.float32, (3, 20), elements=floats))
def test_the_elected_mean_is_the_papers_disjoint_mean(scaled):
    found = elected_mean(list(scaled))
    for place, column in enumerate(scaled.T):
        total = np.float32(0)
        for value in column:
            total += value
        agreeing = [value for value in column if (value > 0 if total >= 0 else value < 0)]
        expected = sum(agreeing, np.float32(0)) / max(len(agreeing), 1)
        assert found[place] == pytest.approx(expected, rel=1e-5, abs=1e-30)


def test_one_vector_alone_is_elected_as_it_is():
    d = np.array([1, -2, 0], np.float32)
    assert elected_mean([d]).tolist() == d.tolist()


def test_the_gate_is_one_minus_the_sigmoid():
    change = np.linspace(0.25, 2.25, 12_345, dtype=np.float32)
    m = (change.astype(np.float64) - 0.25) / 2
    expected = 1 - 1 / (1 + np.exp(-(12 * m - 6)))
    assert np.abs(gate.gate(change, 0.25, 2.25) - expected).max() < 1e-6


def test_the_gate_of_a_tensor_that_moved_all_alike():
    assert (gate.gate(np.full(3, 0.5, np.float32), 0.5, 0.5) == gate.table()[0]).all()
