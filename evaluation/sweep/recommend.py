"""The recommended point, by the recipe's rule.

1. points that break a limit are excluded
2. of the others, those within `tolerance` of the best quality count as equally good
3. of these, the smallest ratio is recommended (by kind: the smallest mean), since it changes the
   CPT model least
4. ratios by kind are recommended only if they are better than one ratio by more than `tolerance`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.evaluators.language import BITS
from cpt_merge.evaluation.sweep.config import RecommendConfig
from cpt_merge.evaluation.sweep.points import Point


@dataclass(frozen=True)
class RatedPoint:
    """A point and the rule. `broken` names the limits that it breaks, `excess` is by how much."""

    point: Point
    quality: float
    excess: float
    broken: list[str]

    @property
    def score(self) -> float:
        """What the search maximises."""
        return self.quality - self.excess


@dataclass(frozen=True)
class Recommendation:
    """`point` is None if there is nothing to recommend."""

    point: Point | None
    sentence: str


def drawn_metrics(rule: RecommendConfig) -> list[str]:
    """The metrics that are drawn over the ratio: the rule's, `in_language` and bits per byte."""
    return list(dict.fromkeys([rule.quality, "in_language", *rule.at_least, *rule.at_most, BITS]))


def rate(
    point: Point, rule: RecommendConfig, languages: Sequence[str], at_zero: Point
) -> RatedPoint:
    """Rate a point. Raises `UserError` if a metric of the rule was measured in no language."""
    broken, excess = list[str](), 0.0
    for metric, limit in rule.at_least.items():
        value = _mean(point, metric, languages)
        if value < limit:
            broken.append(f"{metric} {value:.3g} < {limit:g}")
            excess += limit - value
    for metric, limit in rule.at_most.items():
        value = _mean(point, metric, languages)
        if value > limit:
            broken.append(f"{metric} {value:.3g} > {limit:g}")
            excess += value - limit
    rise = _rise_of(point, at_zero, languages)
    if rule.bits_per_byte_rise is not None and rise is not None and rise > rule.bits_per_byte_rise:
        broken.append(f"bits per byte {rise:+.1%}")
        excess += rise - rule.bits_per_byte_rise
    return RatedPoint(point, _mean(point, rule.quality, languages), excess, broken)


def _rise_of(point: Point, at_zero: Point, languages: Sequence[str]) -> float | None:
    """The rise of bits per byte over ratio 0 as a share, mean over languages.

    None if bits per byte were not measured.
    """
    rises = [
        point.metrics[one][BITS].value / at_zero.metrics[one][BITS].value - 1
        for one in languages
        if BITS in point.metrics.get(one, {}) and BITS in at_zero.metrics.get(one, {})
    ]
    return sum(rises) / len(rises) if rises else None


def recommend(rated: Sequence[RatedPoint], rule: RecommendConfig) -> Recommendation:
    """Apply the rule to all points."""
    allowed = [one for one in rated if not one.broken]
    if not allowed:
        nearest = max(rated, key=lambda one: one.score)
        return Recommendation(
            None,
            "no ratio is recommended: every one breaks a limit of sweep.recommend; the nearest is "
            f"{nearest.point.name} ({', '.join(nearest.broken)}).",
        )
    if not any(one.quality for one in allowed):
        return Recommendation(
            None, f"no ratio is recommended: {rule.quality} is 0 at every one within the limits."
        )
    line = [one for one in allowed if one.point.ratio is not None]
    by_kind = [one for one in allowed if one.point.ratio is None]
    if by_kind and (not line or _best(by_kind).quality > _best(line).quality + rule.tolerance):
        chosen = _smallest_of_the_best(by_kind, rule)
        why = (
            f"with one ratio: {_best(line).quality:.3f}" if line else "any one ratio breaks a limit"
        )
    else:
        best, chosen = _best(line), _smallest_of_the_best(line, rule)
        why = f"within {rule.tolerance:g} of the best, {best.quality:.3f} at {best.point.name}"
        why = "the best" if chosen is best else why
    return Recommendation(
        chosen.point,
        f"recommended: {chosen.point.name} ({rule.quality} {chosen.quality:.3f}, {why}).",
    )


def _best(rated: Sequence[RatedPoint]) -> RatedPoint:
    return max(rated, key=lambda one: one.quality)


def _smallest_of_the_best(rated: Sequence[RatedPoint], rule: RecommendConfig) -> RatedPoint:
    equal = [one for one in rated if one.quality >= _best(rated).quality - rule.tolerance]
    return min(
        equal, key=lambda one: sum(map(abs, one.point.ratios.values())) / len(one.point.ratios)
    )


def _mean(point: Point, metric: str, languages: Sequence[str]) -> float:
    value = point.mean(metric, languages)
    if value is None:
        raise UserError(
            f"sweep.recommend names {metric}, which was not measured in {', '.join(languages)}; "
            "choose another metric, or prompts in these languages."
        )
    return value
