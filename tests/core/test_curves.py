"""Curves as SVG: axes, gaps, extremes, values under the pointer."""

import math
import re

import pytest

from cpt_merge.core.curves import MOST_POINTS, Axis, ChartForm, Curve, draw_curves, thin

STEP_FORM = ChartForm("step")


def test_a_value_that_is_not_finite_leaves_a_gap():
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, math.nan), (3.0, 2.0), (4.0, math.inf), (5.0, 1.0)]
    drawn = draw_curves("loss", [Curve("loss", points)], STEP_FORM)
    assert [len(found.split()) for found in re.findall(r'points="([^"]*)"', drawn)] == [2, 1, 1]
    assert not re.search(r'="nan"|nan,|,nan', drawn)
    assert drawn.count('class="odd"') == 2
    assert draw_curves("loss", [Curve("loss", [(0.0, math.nan)])], STEP_FORM) == ""


def test_curves_of_one_point_and_of_equal_values_are_drawn():
    for points in ([(7.0, 3.0)], [(0.0, 0.0), (9.0, 0.0)]):
        for form in (
            STEP_FORM,
            ChartForm("step", from_zero=True),
            ChartForm("step", may_be_log=True),
        ):
            assert "<circle" in draw_curves("t", [Curve("a", points)], form)


def test_the_values_of_all_lines_show_under_the_pointer():
    lines = [Curve("ko", [(0.0, 4.0), (9.0, 1.5)]), Curve("zh_tw", [(0.0, 3.0), (9.0, 1.25)])]
    assert "<title>step 9\nko: 1.5\nzh_tw: 1.25</title>" in draw_curves("t", lines, STEP_FORM)


def test_values_far_apart_get_a_logarithmic_axis():
    axis = Axis(0.8, 20, 100, 0, logarithmic=True)
    assert axis.ticks() == [1, 2, 5, 10, 20]
    assert axis.place(4) - axis.place(8) == pytest.approx(axis.place(2) - axis.place(4))


def test_long_curves_keep_their_extremes_and_their_end():
    points = [(float(x), math.sin(x / 50)) for x in range(10_001)]
    points[1234], points[4321] = (1234.0, 9.0), (4321.0, math.nan)
    kept = thin(points)
    assert len(kept) <= MOST_POINTS
    assert {points[1234], points[-1]} <= set(kept)
    assert any(math.isnan(y) for _, y in kept)
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert thin(points[:9]) == points[:9]


@pytest.mark.parametrize(("low", "high"), [(0, 600), (0.00001, 0.0002), (-3, 4.9e6), (3.1, 3.2)])
def test_axis_ticks_are_round_few_and_within(low, high):
    ticks = Axis(low, high, 0, 100).ticks()
    assert 3 <= len(ticks) <= 9
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
