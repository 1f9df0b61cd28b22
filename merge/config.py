"""The recipe's `embeddings` and `merge` sections."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import field_validator, model_validator

from core.config import Section, key

Method = Literal["constituents", "mean", "gaussian", "random"]
Kind = Literal["attention", "mlp", "norm", "embed", "head", "other"]
Dtype = Literal["bfloat16", "float16", "float32"]


class EmbeddingsConfig(Section):
    """What the rows of new pieces start from, before continual pretraining."""

    input: Method = key(
        "constituents",
        "input embedding; constituents: mean of the pieces that spelt it before; mean: mean of the old rows; "
        "gaussian: drawn with the old rows' mean and covariance; random: isotropic, with the old rows' norm",
    )
    head: Method = key("constituents", "output head, by the same methods; a tied model has no rows of its own there")
    seed: int = key(0, "seed of everything that is drawn", ge=0)


class RuleConfig(Section):
    """What is done with the tensors that match all of `pattern`, `kinds` and `layers` (those that are set)."""

    pattern: str | None = key(None, "regular expression that is searched in the tensor's name")
    kinds: list[Kind] = key([], "module kinds: attention, mlp, norm, embed, head, other")
    layers: tuple[int, int] | None = key(None, "first and last decoder layer, both included, counted from 0")
    action: Literal["add", "skip", "replace"] = key(
        "add", "add: add ratio times the vector; skip: keep the CPT tensor; replace: take the chat model's"
    )
    ratio: float | None = key(None, "ratio for `add`; the section's if not set")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"not a regular expression ({error}); escape special characters") from None
        return pattern

    @model_validator(mode="after")
    def _makes_sense(self) -> RuleConfig:
        if self.pattern is None and not self.kinds and self.layers is None:
            raise ValueError("a rule without pattern, kinds or layers; set the section's ratio instead")
        if self.ratio is not None and self.action != "add":
            raise ValueError(f"a ratio has no meaning for {self.action}; leave it out")
        if self.layers is not None and not 0 <= self.layers[0] <= self.layers[1]:
            raise ValueError("layers are [first, last] with 0 <= first <= last")
        return self


class MergeConfig(Section):
    """The chat vector: `merged = cpt + ratio * (chat - base)`."""

    ratio: float = key(1.0, "how much of the chat vector is added; lower it if replies drift into English")
    rules: list[RuleConfig] = key([], "exceptions; the first that matches a tensor decides")
    new_rows: Literal["keep", "constituents"] = key(
        "keep",
        "rows of new pieces; keep: as trained; constituents: add the mean vector of their constituents' rows",
    )
    dtype: Dtype | None = key(None, "type of the output's tensors; the base's, tensor by tensor, if not set")
    shard_size: float = key(5.0, "largest size of one file of the output", unit="GB", gt=0)

    @property
    def shard_bytes(self) -> int:
        """`shard_size` in bytes."""
        return int(self.shard_size * 1e9)
