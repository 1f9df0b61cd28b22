"""Intervals of one metric and of the difference between two models, and how often they are right."""

import math

import numpy as np
import pytest

from cpt_merge.evaluation.compare import metrics_by_evaluator, summarise
from cpt_merge.evaluation.evaluators.evaluator import Findings, Measurement, Metric
from cpt_merge.evaluation.evaluators.form import FormEvaluator
from cpt_merge.evaluation.results import ModelResult, each
from cpt_merge.evaluation.statistics import (
    Estimate,
    corrected,
    difference,
    estimate,
    fewest_units,
)
from cpt_merge.evaluation.tables import show, what_differs


def parts(values):
    return {unit: (value, 1.0) for unit, value in enumerate(values)}


def test_the_interval_of_a_mean_agrees_with_theory():
    values = np.random.default_rng(0).normal(size=400)
    found = estimate(parts(values))
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.966 * values.std(ddof=1) / 20, rel=1e-3)
    assert estimate({0: (2.0, 1.0), 1: (6.0, 3.0)}).value == 2.0
    assert estimate(parts([2.5])) == Estimate(2.5, 2.5, 2.5, 1)


def test_the_paired_interval_is_narrower_where_models_fail_at_the_same_prompts():
    random = np.random.default_rng(0)
    easy = random.random(200) < 0.5
    base = parts(easy.astype(float))
    better = parts(
        np.where(random.random(200) < 0.1, 1.0, easy)
    )  # the same prompts, and a few more
    found = difference(better, base, seed=0)
    assert found is not None
    assert found.p < 0.001
    alone = [estimate(one) for one in (base, better)]
    assert found.high - found.low < 0.5 * sum(one.high - one.low for one in alone)
    assert alone[0].high > alone[1].low, "the two intervals alone would not have told them apart"


def test_no_difference_has_a_p_of_1_and_only_common_units_count():
    same = parts([1.0, 0.0, 1.0])
    found = difference(same, same, seed=0)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert difference({0: (1.0, 1.0), 7: (1.0, 1.0)}, {0: (0.0, 1.0), 8: (1.0, 1.0)}, seed=0).n == 1
    assert difference({0: (1.0, 1.0)}, {1: (1.0, 1.0)}, seed=0) is None


def test_five_equal_changes_may_be_chance_and_six_hardly():
    for n, p in ((1, 1), (3, 1 / 4), (5, 1 / 16), (6, 1 / 32)):
        found = difference(parts([1.0] * n), parts([0.5] * n), seed=0)
        assert found is not None
        assert found.p == p


def test_holm():
    assert corrected([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert corrected([0.9, 0.8]) == [1.0, 1.0]
    assert corrected([]) == []


def test_of_many_differences_without_any_effect_none_is_starred():
    """63 comparisons of equal models: uncorrected, 2 of 3 evaluations starred one."""
    random, evaluations = np.random.default_rng(0), 40
    starred = 0
    for _ in range(evaluations):
        ours, theirs = random.random((2, 63, 27)) < 0.6
        chances = [
            difference(parts(one), parts(other), 0, share=True).p
            for one, other in zip(ours.astype(float), theirs.astype(float), strict=True)
        ]
        starred += min(corrected(chances)) < 0.05
    assert starred <= 5


SIZES, SHARES = (5, 10, 25, 50, 200), (0.0, 0.05, 0.2, 0.5, 0.9, 1.0)


def test_known_intervals_of_shares():
    """Clopper and Pearson's, as scipy.stats.binomtest has them."""
    for hits, n, low, high in ((0, 10, 0, 0.3085), (1, 10, 0.0025, 0.4450), (27, 27, 0.8723, 1)):
        found = estimate(parts([1.0] * hits + [0.0] * (n - hits)), share=True)
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("share", SHARES)
def test_coverage_of_a_share_of_independent_units(n, share):
    """Exactly: the sum over all numbers of hits. The bootstrap had 42 % at n = 10 and 5 %."""
    covered = 0.0
    for hits in range(n + 1):
        chance = math.comb(n, hits) * share**hits * (1 - share) ** (n - hits)
        found = estimate(parts([1.0] * hits + [0.0] * (n - hits)), share=True)
        covered += chance * (found.low <= share <= found.high)
    assert covered >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("alike", [0.0, 0.3, 1.0], ids=lambda alike: f"alike{alike}")
def test_coverage_of_a_share_within_dialogues(n, share, alike):
    """Three turns per dialogue; `alike` is the share of dialogues whose turns all agree."""
    random, runs = np.random.default_rng(1), 1000
    covered = 0
    for _ in range(runs):
        turns = random.random((n, 3)) < share
        same = random.random(n) < alike
        turns[same] = turns[same, :1]
        units = {unit: (float(hits), 3.0) for unit, hits in enumerate(turns.sum(axis=1))}
        found = estimate(units, share=True)
        covered += found.low <= share <= found.high
    assert covered / runs >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize("n", SIZES)
def test_coverage_of_a_mean(n):
    random, runs = np.random.default_rng(2), 1000
    found = [estimate(parts(values)) for values in random.normal(size=(runs, n))]
    assert sum(one.low <= 0 <= one.high for one in found) / runs >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("base", "change"), [(0.0, 0.0), (0.05, 0.0), (0.5, 0.2), (0.1, 0.8)])
def test_coverage_of_a_difference_of_shares(n, base, change):
    random, runs = np.random.default_rng(3), 1000 if n < 200 else 300
    covered = 0
    for _ in range(runs):
        draws = random.random(n)
        theirs = draws < base
        ours = draws < base + change  # the models fail at the same prompts
        if change == 0:
            ours = random.random(n) < base
        found = difference(parts(ours.astype(float)), parts(theirs.astype(float)), 0, share=True)
        covered += found.low <= change <= found.high
    assert covered / runs >= 0.93


def metric(name, hits_of_models):
    shown = Metric(name, name, name)
    return {
        model: Findings([Measurement(shown, "ko", parts([1.0] * hits + [0.0] * (30 - hits)))])
        for model, hits in hits_of_models.items()
    }


def test_the_first_sentence_names_what_differs_of_all_that_was_compared(capsys):
    metrics = [
        metric("chat", {"base": 0, "chat": 6, "merged": 30}),  # 6 of 30: p = 0.03
        metric("stopped", {"base": 15, "chat": 15, "merged": 15}),
    ]
    models = [
        ModelResult(name, [found[name] for found in metrics], [], 0.0)
        for name in ("base", "chat", "merged")
    ]
    results = summarise(models, metrics_by_evaluator([FormEvaluator()]), None, 0)
    assert {
        (model, name): one.beyond for model, _, name, one in each(results.differences)
    } == {
        ("chat", "chat"): False, ("chat", "stopped"): False,
        ("merged", "chat"): True, ("merged", "stopped"): False,
    }  # fmt: skip
    assert results.differences["chat"]["ko"]["chat"].p < 0.05
    show(results, {}, 0)
    first = " ".join(capsys.readouterr().err.split("Korean")[0].split())
    assert first.startswith(
        "evaluation: 4 differences to base compared: chat: nothing differs; "
        "merged: ko chat +100 (at 5 %, Holm's correction)"
    )


@pytest.mark.parametrize("compared", [1, 2, 7, 100])
def test_fewer_units_can_never_show_a_difference(compared):
    fewest = fewest_units(compared)
    for n, enough in ((fewest - 1, False), (fewest, True)):
        p = difference(parts([1.0] * n), parts([0.0] * n), 0).p
        assert (corrected([p] + [1.0] * (compared - 1))[0] < 0.05) == enough


def first_sentence(of_metrics):
    """What is said first about models whose metrics have these hits, all of n units."""
    findings = [
        {
            model: Findings([Measurement(Metric(name, name, name), "ko", parts(ones(hits, n)))])
            for model, hits in hits_of_models.items()
        }
        for name, (n, hits_of_models) in of_metrics.items()
    ]
    models = [
        ModelResult(name, [one[name] for one in findings], [], 0.0) for name in ("base", "cpt")
    ]
    return what_differs(summarise(models, metrics_by_evaluator([FormEvaluator()]), None, 0))


def ones(hits, n):
    return [1.0] * hits + [0.0] * (n - hits)


def test_too_few_documents_are_not_called_equal():
    few = {"chat": (2, {"base": 0, "cpt": 2}), "stopped": (4, {"base": 0, "cpt": 4})}
    assert first_sentence(few) == (
        "evaluation: 2 differences to base compared: cpt: too few to tell (2 to 4) (at 5 %, Holm's "
        "correction; one needs at least 7 documents or prompts)"
    )
    few["empty"] = (30, {"base": 10, "cpt": 10})
    assert "cpt: nothing differs, too few to tell in 2 of 3 (2 to 4) (" in first_sentence(few)
    few["empty"] = (30, {"base": 0, "cpt": 30})
    assert "cpt: ko empty +100, too few to tell in 2 of 3 (2 to 4)" in first_sentence(few)
