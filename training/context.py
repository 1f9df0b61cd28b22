"""Context extension: longer sequences, and rotary positions that reach them.

Rotary positions turn pairs of a query's and a key's numbers by the angle position * theta^(-2i/d).
Sequences that are longer than those a model was trained on need other angles, and some training:

- `theta`: a larger base slows all turns (Xiong et al., Effective Long-Context Scaling of Foundation
  Models, 2023, https://arxiv.org/abs/2309.16039);
- `linear`: positions are divided by the factor (Chen et al., Position Interpolation, 2023,
  https://arxiv.org/abs/2306.15595);
- `yarn`: fast turns stay, slow ones are divided (Peng et al., YaRN, 2023,
  https://arxiv.org/abs/2309.00071);
- `llama3`: the same idea with other bounds (Grattafiori et al., The Llama 3 Herd of Models, 2024,
  https://arxiv.org/abs/2407.21783).

The formulas are those of transformers, chosen by the values that are written to config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import model_validator

from cpt_merge.checkpoint.loaded import text_section
from cpt_merge.checkpoint.positions import STRETCHED, positions_of, rope_settings, rope_type
from cpt_merge.checkpoint.text_sections import TEXT_SECTIONS
from cpt_merge.core.config import Section, key
from cpt_merge.core.errors import UserError

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # of Llama 3.1


class RopeConfig(Section):
    """Rotary positions, in place of those of the model that the run starts from."""

    theta: float | None = key(None, "base of the angles; the model's own if not set", gt=1)
    type: Literal["linear", "yarn", "llama3"] | None = key(
        None, "how positions are stretched by `factor`; as in the model if not set"
    )
    factor: float | None = key(
        None, "what the positions are stretched by that the model had before any stretching", gt=1
    )

    @model_validator(mode="after")
    def _fits(self) -> RopeConfig:
        if (self.type is None) != (self.factor is None):
            raise ValueError("`type` and `factor` belong together; set both or neither")
        if self.type is None and self.theta is None:
            raise ValueError("it changes nothing; set theta, or type and factor")
        return self


@dataclass(frozen=True)
class Context:
    """The length of the sequences, and the rotary positions with which the model reads them."""

    length: int  # tokens
    rope: RopeConfig | None = None  # None: the model's own

    def __str__(self) -> str:
        text = f"sequences of {self.length:,} tokens"
        if self.rope is None:
            return text
        theta = [f"theta {self.rope.theta:,g}"] if self.rope.theta else []
        stretch = [f"{self.rope.type} with factor {self.rope.factor:g}"] if self.rope.factor else []
        return f"{text}; rotary positions: {', '.join(theta + stretch)}"

    def extend(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json of a model that reads sequences of this length; the same without `rope`.

        `model` has the values of the model that the run starts from, or those that this function
        made of them. Raises `UserError` for a model whose positions cannot be changed like this.
        """
        if self.rope is None:
            return dict(model)
        text = text_section(model)
        fields = {**self._rotation(text, self.rope), **self._positions(text, self.rope)}
        found = _with_fields(model, fields)
        self._check_understood(found)
        return found

    def _rotation(self, text: Mapping[str, Any], rope: RopeConfig) -> dict[str, Any]:
        """The fields of the rotary positions, in the style that the file has."""
        own = text.get("rope_parameters")
        if not isinstance(own, Mapping):  # of transformers before version 5
            theta = {"rope_theta": rope.theta} if rope.theta else {}
            if rope.type is None:
                return theta
            return {**theta, "rope_scaling": _stretched(text, text.get("rope_scaling"), rope)}
        nested = own.get("full_attention")  # layers with a window need no other angles
        changed = dict(nested if isinstance(nested, Mapping) else own)
        if rope.type:
            changed = _stretched(text, changed, rope)
        if rope.theta:
            changed["rope_theta"] = rope.theta
        whole = {**own, "full_attention": changed} if isinstance(nested, Mapping) else changed
        return {"rope_parameters": whole}

    def _positions(self, text: Mapping[str, Any], rope: RopeConfig) -> dict[str, int]:
        """`max_position_embeddings`, which loaders multiply by the factor of `linear` only."""
        named, kind = text.get("max_position_embeddings"), rope.type
        if kind is None and any(rope_type(one) in STRETCHED for one in rope_settings(text)):
            return {}  # they reach as far as their factor says
        if kind == "linear" or not isinstance(named, int):
            return {}
        reach = self.length
        if rope.type == "yarn" and rope.factor:
            reach = round(_original(text) * rope.factor)
        return {"max_position_embeddings": max(named, reach)}

    def _check_understood(self, model: Mapping[str, Any]) -> None:
        """Raise `UserError` unless transformers reads from it what was asked for."""
        from transformers import CONFIG_MAPPING

        assert self.rope
        kind = str(model.get("model_type"))
        read: Any = None
        if kind in CONFIG_MAPPING:
            config = CONFIG_MAPPING[kind].from_dict(deepcopy(dict(model)))  # which it changes
            read = config.get_text_config(decoder=True)
        found = getattr(read, "rope_parameters", None) or {}
        found = found.get("full_attention") or found
        wanted = {
            "rope_theta": self.rope.theta,
            "rope_type": self.rope.type,
            "factor": self.rope.factor,
        }
        if any(found.get(name) != value for name, value in wanted.items() if value is not None):
            raise UserError(
                f"`rope` changes rotary positions, and transformers reads none of them from the "
                f"config.json of the family {kind}; leave it out."
            )

    def check(self, model: Mapping[str, Any], name: str) -> None:
        """Raise `UserError` if sequences have more tokens than the model will have positions.

        `model` has the values of its config.json; `name` is the key of the length.
        """
        positions = positions_of(self.extend(model))
        if positions is None or self.length <= positions:
            return
        do = "raise the factor of `rope`" if self.rope else "extend them with `rope`"
        raise UserError(
            f"{name} = {self.length} but the model has {positions} positions; lower it, or {do}."
        )


def _stretched(
    text: Mapping[str, Any], own: Mapping[str, Any] | None, rope: RopeConfig
) -> dict[str, Any]:
    """The settings of a stretch in place of the model's own, which has to be of the same type."""
    own = dict(own or {})
    kind = rope_type(own)
    own.pop("type", None)
    if kind not in ("default", rope.type):
        raise UserError(
            f"the model's rotary positions are of the type {kind} already, so they cannot be "
            f"stretched as {rope.type}, too; set `type: {kind}` with a larger factor if that is "
            "linear, yarn or llama3, or change theta alone."
        )
    settings = {**own, "rope_type": rope.type, "factor": rope.factor}
    if rope.type == "llama3":
        settings = {**_LLAMA3, **settings}
    if rope.type != "linear":
        settings["original_max_position_embeddings"] = _original(text)
    return settings


def _original(text: Mapping[str, Any]) -> int:
    """The positions that the model had before any stretching."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rope = rope.get("full_attention") or rope
    original = rope.get("original_max_position_embeddings") or text.get("max_position_embeddings")
    if not isinstance(original, int):
        raise UserError(
            "the model's config.json has no max_position_embeddings, so a factor has nothing to "
            "stretch; leave `rope` out."
        )
    return original


def _with_fields(model: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with other values of the text decoder, which may be a section of it."""
    sections = [name for name in TEXT_SECTIONS if isinstance(model.get(name), Mapping)]
    if not sections:
        return {**model, **fields}
    stated = {name: value for name, value in fields.items() if name in model}
    return {**model, **stated, **{name: _with_fields(model[name], fields) for name in sections}}
