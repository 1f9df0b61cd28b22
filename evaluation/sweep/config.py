"""The recipe's `sweep` section."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Any

from pydantic import field_validator, model_validator

from cpt_merge.checkpoint.tensor_kinds import Kind
from cpt_merge.core.config import Section, key
from cpt_merge.evaluation.config import Suite
from cpt_merge.merge.config import Ratio

MOST_RATIOS = 1000  # more is a typing error such as 0:1.2:0.0001


class RecommendConfig(Section):
    """The rule for the recommended ratio. Metrics are means over the new languages."""

    quality: str = key("chat", "metric of results.json that should be high")
    tolerance: float = key(
        0.02,
        "ratios this close to the best quality count as equally good; the smallest is recommended",
        ge=0,
    )
    at_least: dict[str, float] = key({}, "lower limits of metrics, such as in_language: 0.9")
    at_most: dict[str, float] = key({}, "upper limits of metrics, such as repetition: 0.3")
    bits_per_byte_rise: float | None = key(
        0.1, "allowed rise of bits per byte over ratio 0, as a share; null: no limit", ge=0
    )


class SearchConfig(Section):
    """After the sweep: a search over ratios by kind of module, by TPE (Bergstra et al., 2011)."""

    trials: int = key(0, "number of merges that are evaluated; 0: no search", unit="merges", ge=0)
    kinds: list[Kind] = key(
        ["attention", "linear_attn", "mamba", "mixer", "mlp", "experts", "norm", "embed", "head"],
        "kinds with a ratio of their own, as far as the model has them; others keep merge.ratio",
        min_length=1,
    )
    low: float = key(0.0, "smallest ratio")
    high: float = key(1.2, "largest ratio")
    step: float = key(0.05, "distance between ratios", gt=0)
    seed: int = key(0, "seed of the search", ge=0)

    @model_validator(mode="after")
    def _is_a_range(self) -> SearchConfig:
        if self.low >= self.high:
            raise ValueError("low is not below high; set a range")
        return self


class SweepConfig(Section):
    """`cpt-merge sweep`: the ratios, what is measured at each, and which one is recommended."""

    ratios: list[float] = key(
        "0:1.2:0.1",
        'ratios of the chat vector, "first:last:step" in quotes or a list; merge.rules still apply',
    )
    per_layer: Ratio | None = key(
        None, "expression of the layer, such as `ramp(0.3, 1)`, that multiplies every ratio"
    )
    suites: list[Suite] = key(
        ["language", "chat"],
        "what is measured; everything else, such as evaluation.prompts, is as in `evaluation`",
        min_length=1,
    )
    max_prompts: int | None = key(
        None,
        "number of prompts per language and evaluator; if not set: evaluation.max_prompts",
        unit="prompts",
        gt=0,
    )
    cpt: str | None = key(
        None,
        "another trained model of this run, such as one of `cpt-merge export`; if not set: the one "
        "that the training made",
    )
    recommend: RecommendConfig = key(RecommendConfig(), "the rule for the recommended ratio")
    search: SearchConfig = key(SearchConfig(), "search over ratios by kind of module")

    @field_validator("ratios", mode="before")
    @classmethod
    def _spelt_out(cls, ratios: Any) -> Any:
        if isinstance(ratios, str):
            return _spell_out(ratios)
        if isinstance(ratios, (int, float)):  # YAML 1.1 reads 0:1:0.1 as a time of day
            raise ValueError('no range; write "first:last:step" in quotes, or a list')
        return ratios

    @field_validator("ratios")
    @classmethod
    def _each_once(cls, ratios: list[float]) -> list[float]:
        if not ratios:
            raise ValueError("there is no ratio; name some")
        return sorted(set(ratios))


def _spell_out(text: str) -> list[float]:
    """`0:1.2:0.1` as 0, 0.1, ..., 1.2: decimal, so that 0.3 is 0.3; `0.5,1` as these two.

    Raises `ValueError`.
    """
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        first, last, step = (Decimal(part.strip()) for part in text.split(":"))
    except (ValueError, InvalidOperation):
        raise ValueError("neither first:last:step nor numbers with commas between") from None
    if (
        not (first.is_finite() and last.is_finite() and step.is_finite())
        or step <= 0
        or last < first
    ):
        raise ValueError("first:last:step goes from first up to last in steps above 0")
    count = int((last - first) / step) + 1
    if count > MOST_RATIOS:
        raise ValueError(f"{count} ratios; take a larger step")
    return [float(first + number * step) for number in range(count)]
