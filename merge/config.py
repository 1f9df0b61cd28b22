"""The recipe's `merge` section."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, field_validator, model_validator

from cpt_merge.checkpoint.dtypes import Dtype
from cpt_merge.checkpoint.tensor_kinds import Kind
from cpt_merge.core.config import Section, key
from cpt_merge.merge.expressions import evaluate

Combination = Literal["add", "ties", "dare", "dare_ties", "interpolate", "slerp"]
WITHOUT_BASE: tuple[Combination, ...] = ("interpolate", "slerp")
"""Methods that lead from CPT to the chat model itself, and need no base."""


def _evaluates(ratio: Any) -> float | str:
    """Check before pydantic tries one type after the other, which would give two messages."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float, str)):
        raise ValueError("neither a number nor an expression of the layer, such as `ramp(0.3, 1)`")
    for layers in (1, 40):
        for layer in (0, layers - 1):
            evaluate(ratio, layer, layers)
    return ratio


Ratio = Annotated[float | str, BeforeValidator(_evaluates)]
"""A number, or an expression of the layer (`merge/expressions.py`)."""


class RuleConfig(Section):
    """What happens to the tensors that match `pattern`, `kinds` and `layers`, if they are set."""

    pattern: str | None = key(None, "regular expression that is searched in the tensor's name")
    kinds: list[Kind] = key([], "kinds of modules, by the names of their tensors")
    layers: tuple[int, int] | None = key(
        None, "first and last decoder layer, both included, counted from 0"
    )
    action: Literal["add", "skip", "replace"] = key(
        "add",
        "add: add ratio times the vector; skip: keep the CPT tensor; replace: take the chat "
        "model's",
    )
    ratio: Ratio | None = key(
        None, "ratio for `add`, a number or an expression; the section's if not set"
    )
    gate: bool | None = key(None, "as the section's `gate`, for these tensors")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(
                f"not a regular expression ({error}); escape special characters"
            ) from None
        return pattern

    @model_validator(mode="after")
    def _makes_sense(self) -> RuleConfig:
        if self.pattern is None and not self.kinds and self.layers is None:
            raise ValueError(
                "a rule without pattern, kinds or layers; set the section's ratio instead"
            )
        if self.action != "add" and not (self.ratio is None and self.gate is None):
            raise ValueError(f"a ratio or a gate has no meaning for {self.action}; leave it out")
        if self.layers is not None and not 0 <= self.layers[0] <= self.layers[1]:
            raise ValueError("layers are [first, last] with 0 <= first <= last")
        return self


class VectorConfig(Section):
    """A further vector: `chat - base` of another pair, or one that `extract-vector` wrote."""

    chat: str | None = key(None, "the pair's chat model: a directory or a hub id")
    base: str | None = key(None, "the pair's base model")
    vector: str | None = key(None, "a vector's directory, instead of the pair")
    ratio: Ratio = key(1.0, "how much of it is added; negative to take away (forgetting)")
    rules: list[RuleConfig] = key(
        [], "exceptions for this vector alone; `add` with another ratio, or `skip`"
    )

    @model_validator(mode="after")
    def _is_one_source(self) -> VectorConfig:
        if self.vector is None and (self.chat is None or self.base is None):
            raise ValueError("a vector is a pair, `chat` and `base`, or a directory, `vector`")
        if self.vector is not None and self.chat is not None:
            raise ValueError(
                "a vector is a pair or a directory, not both; leave out `chat` or `vector`"
            )
        if any(rule.action == "replace" or rule.gate is not None for rule in self.rules):
            raise ValueError(
                "rules of a further vector may add or skip; replace and gate belong to merge.rules"
            )
        return self


class MergeConfig(Section):
    """The chat vector: `merged = cpt + ratio * (chat - base)`."""

    ratio: Ratio = key(
        1.0,
        "how much of the chat vector is added; lower it if replies drift into English. A number, "
        "or an expression of "
        "the layer: `ramp(0.3, 1)`, `1 - 0.5 * depth`, `max(0.2, 1 - layer / 40)`",
    )
    rules: list[RuleConfig] = key([], "exceptions; the first that matches a tensor decides")
    gate: bool = key(False, "lower the vector, element by element, where CPT moved most")
    vectors: list[VectorConfig] = key([], "further vectors, added to the same model")
    method: Combination = key(
        "add",
        "how vectors are thinned and joined; add: as they are; ties: the largest `density` of "
        "each, signs elected; "
        "dare: a random `density` of each, enlarged to the same mean; dare_ties: both. Without a "
        "base: interpolate: the straight line from CPT (ratio 0) to chat (ratio 1); slerp: the arc",
    )
    density: float | None = key(
        None, "share of each vector's elements that ties and dare keep", gt=0, le=1
    )
    seed: int = key(0, "seed of what dare draws", ge=0)
    new_rows: Literal["keep", "constituents"] = key(
        "keep",
        "rows of new pieces; keep: as trained; constituents: add the mean vector of their "
        "constituents' rows",
    )
    token_map: dict[str, str] = key(
        {},
        "token of the chat model -> token of CPT that becomes it: the row is taken from chat, the "
        "id stays",
    )
    statistics: Literal["sample", "all"] = key(
        "sample",
        "elements from which norms and cosines are computed; sample: one in sixteen, spread over "
        "every tensor",
    )
    dtype: Dtype | None = key(
        None, "type of the output's tensors; the base's, tensor by tensor, if not set"
    )
    shard_size: float = key(5.0, "largest size of one file of the output", unit="GB", gt=0)

    @model_validator(mode="after")
    def _density_goes_with_the_method(self) -> MergeConfig:
        thinned = self.method in ("ties", "dare", "dare_ties")
        if (self.density is not None) != thinned:
            raise ValueError(
                f"set a density together with ties or dare, and only then (method is {self.method})"
            )
        if self.seed and "dare" not in self.method:
            raise ValueError(f"a seed has no meaning for method {self.method}; leave it out")
        return self

    @model_validator(mode="after")
    def _interpolation_stands_alone(self) -> MergeConfig:
        if not self.interpolates:
            return self
        if "ratio" not in self.model_fields_set:
            raise ValueError(
                f"{self.method} needs a ratio: the chat model's share, from 0 to 1, such as 0.5"
            )
        if self.vectors or self.gate or any(rule.gate for rule in self.rules):
            raise ValueError(
                f"{self.method} leads to the chat model; leave out further vectors and gates"
            )
        if self.new_rows != "keep":
            raise ValueError(f"new_rows: {self.new_rows} needs a base, which {self.method} has not")
        return self

    @property
    def interpolates(self) -> bool:
        """Whether the merge leads from CPT to the chat model, without a base."""
        return self.method in WITHOUT_BASE

    @property
    def shard_bytes(self) -> int:
        """`shard_size` in bytes."""
        return int(self.shard_size * 1e9)


def format_alone(config: MergeConfig) -> MergeConfig:
    """A merge that gives CPT the chat format, in place of `config`, and nothing of the vector."""
    nothing = [RuleConfig(pattern="", action="skip")]
    return MergeConfig(
        ratio=0.0, rules=nothing, token_map=config.token_map, dtype=config.dtype,
        shard_size=config.shard_size,
    )  # fmt: skip
