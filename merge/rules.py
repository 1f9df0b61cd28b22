"""What a tensor is, by its name, and which rule applies to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from cpt_merge.checkpoint.tensor_kinds import OTHER_MODALITIES, kind_of, layer_of
from cpt_merge.core.errors import UserError
from cpt_merge.merge.config import MergeConfig, Ratio, RuleConfig
from cpt_merge.merge.expressions import evaluate

Action = Literal["add", "skip", "replace"]


@dataclass(frozen=True)
class Treatment:
    """What happens to one tensor. `ratios` has one for each vector, and matters for `add` only."""

    action: Action
    ratios: tuple[float, ...]
    gate: bool = False


def action_of(name: str, config: MergeConfig) -> Action:
    """The action of the first matching rule.

    Without a rule, what is not part of the text decoder is skipped.
    """
    rule = _first(config.rules, name)
    if rule is None:
        return "skip" if kind_of(name) in OTHER_MODALITIES else "add"
    return rule.action


def skipped_by_default(names: list[str], config: MergeConfig) -> dict[str, int]:
    """Kind -> number of tensors that are skipped although no rule says so."""
    kinds = [kind_of(name) for name in names if _first(config.rules, name) is None]
    return {kind: kinds.count(kind) for kind in OTHER_MODALITIES if kind in kinds}


def treatment_of(name: str, config: MergeConfig, layers: int) -> Treatment:
    """The treatment by the first matching rules, or else by the section. `layers`: of the model."""
    rule, action = _first(config.rules, name), action_of(name, config)
    gate = config.gate if rule is None or rule.gate is None else rule.gate
    ratios = [_ratio(rule, config.ratio, name, layers)]
    if config.interpolates and not 0 <= ratios[0] <= 1:
        raise UserError(
            f"merge.ratio is {ratios[0]:g} for {name}, but {config.method} takes the chat model's "
            "share, from 0 to 1; correct it."
        )
    for number, vector in enumerate(config.vectors):
        where = f"merge.vectors.{number}"
        ratios.append(_ratio(_first(vector.rules, name), vector.ratio, name, layers, where))
    return Treatment(action, tuple(ratios), gate and action == "add")


def _ratio(
    rule: RuleConfig | None, ratio: Ratio, name: str, layers: int, where: str = "merge"
) -> float:
    """The ratio of one vector. `skip` of a further vector leaves that one out."""
    if rule is not None and rule.action != "add":
        return 0.0
    wanted = ratio if rule is None or rule.ratio is None else rule.ratio
    place = layer_of(name)
    if place is None:
        place = 0 if kind_of(name) == "embed" else max(layers - 1, 0)
    try:
        return evaluate(wanted, place, layers)
    except ValueError as error:
        raise UserError(f"{where}: {error}; correct the ratio.") from None


def rule_problems(names: list[str], config: MergeConfig) -> list[str]:
    """A sentence for each rule that would silently have no effect."""
    places = {"merge.rules": config.rules}
    places |= {
        f"merge.vectors.{number}.rules": vector.rules
        for number, vector in enumerate(config.vectors)
    }
    problems = []
    for place, rules in places.items():
        for number, rule in enumerate(rules):
            where = f"{place}.{number} {rule.model_dump(exclude_defaults=True)}"
            matched = [name for name in names if _matches(rule, name)]
            if not matched:
                problems.append(
                    f"{where} matches no tensor; a name looks like {names[len(names) // 2]}"
                )
            elif all(_first(rules, name) is not rule for name in matched):
                problems.append(
                    f"{where} decides nothing, because earlier rules do; put it first or leave it "
                    "out"
                )
    return problems


def _first(rules: list[RuleConfig], name: str) -> RuleConfig | None:
    return next((rule for rule in rules if _matches(rule, name)), None)


def _matches(rule: RuleConfig, name: str) -> bool:
    layer = layer_of(name)
    return (
        (rule.pattern is None or re.search(rule.pattern, name) is not None)
        and (not rule.kinds or kind_of(name) in rule.kinds)
        and (
            rule.layers is None or (layer is not None and rule.layers[0] <= layer <= rule.layers[1])
        )
    )
