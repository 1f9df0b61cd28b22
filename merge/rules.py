"""What a tensor is, by its name, and which rule applies to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from checkpoint.reader import Checkpoint, TensorInfo
from core.errors import UserError
from merge.config import Kind, MergeConfig, RuleConfig

Action = Literal["add", "skip", "replace"]

_KINDS: list[tuple[Kind, re.Pattern[str]]] = [  # the first that is found decides: q_norm lies within self_attn
    ("embed", re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.")),
    ("head", re.compile(r"(^|\.)(lm_head|embed_out|output)\.(weight|bias)$")),
    ("norm", re.compile(r"(norm\w*|ln_\w+)\.(weight|bias)$")),
    ("attention", re.compile(r"\.(self_attn|attn|attention|self_attention)\.")),
    ("mlp", re.compile(r"\.(mlp|feed_forward|ffn|block_sparse_moe|experts)\.")),
]
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Treatment:
    """What is done with one tensor."""

    action: Action
    ratio: float  # for `add`


def kind_of(name: str) -> Kind:
    """The module kind of a tensor."""
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")


def layer_of(name: str) -> int | None:
    """The decoder layer of a tensor, None outside the layers."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def treatment_of(name: str, config: MergeConfig) -> Treatment:
    """The first matching rule's, or the section's ratio."""
    for rule in config.rules:
        if _matches(rule, name):
            return Treatment(rule.action, config.ratio if rule.ratio is None else rule.ratio)
    return Treatment("add", config.ratio)


def check_rules(names: list[str], config: MergeConfig) -> None:
    """Raise `UserError` for a rule that matches nothing: it would be silently without effect."""
    for number, rule in enumerate(config.rules):
        if not any(_matches(rule, name) for name in names):
            wanted = rule.model_dump(exclude_defaults=True)
            raise UserError(
                f"merge.rules.{number} {wanted} matches no tensor; a name looks like {names[len(names) // 2]}."
            )


def _matches(rule: RuleConfig, name: str) -> bool:
    layer = layer_of(name)
    return (
        (rule.pattern is None or re.search(rule.pattern, name) is not None)
        and (not rule.kinds or kind_of(name) in rule.kinds)
        and (rule.layers is None or (layer is not None and rule.layers[0] <= layer <= rule.layers[1]))
    )


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the model's head is its embedding; without a word about it in config.json, if no head is stored."""
    tied = checkpoint.config.get("tie_word_embeddings")
    return not any(kind_of(name) == "head" for name in checkpoint.tensors) if tied is None else bool(tied)


def model_tensors(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """The tensors that a loader uses: a head that is stored although it is tied is left out."""
    tied = is_tied(checkpoint)
    return {name: info for name, info in checkpoint.tensors.items() if not (tied and kind_of(name) == "head")}


def vocabulary_rows(checkpoint: Checkpoint) -> int:
    """Rows of the embedding matrix. Raises `UserError` if there is none."""
    for name, info in checkpoint.tensors.items():
        if kind_of(name) == "embed":
            return info.shape[0]
    raise UserError(f"{checkpoint.directory} holds no embedding matrix that is known by name; report its tensor names.")
