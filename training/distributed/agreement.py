"""What accelerate's and DeepSpeed's files set beside the backend, compared with the recipe.

The recipe decides. A value that means the same there and here must be equal; of others, and of what
has no counterpart, a line says that they are not used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cpt_merge.core.errors import UserError
from cpt_merge.training.config import TrainingConfig

ACCELERATE = "the accelerate config"


@dataclass(frozen=True)
class FileValue:
    """A value of a file, with the path of its key; `where` says in which file."""

    where: str
    key: str
    value: Any


@dataclass(frozen=True)
class _Ours:
    """What the recipe says about the same thing: its value in the file's terms, and in its own."""

    value: Any
    recipe: str


def values_of(where: str, section: Mapping[str, Any], prefix: str = "") -> Iterator[FileValue]:
    """The values of a mapping and of the mappings in it."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from values_of(where, value, f"{prefix}{name}.")
        else:
            yield FileValue(where, prefix + name, value)


def check_equal(values: Iterable[FileValue], config: TrainingConfig) -> None:
    """Raise `UserError` for the first value that contradicts the recipe."""
    same = _same(config)
    for found in values:
        ours = same.get(found.key)
        if ours and not _equal(found.value, ours.value):
            raise UserError(
                f"{found.where} sets {found.key} to {found.value} but {ours.recipe}; make them "
                "equal or remove it there, since the recipe decides."
            )


def not_used(values: Iterable[FileValue], config: TrainingConfig) -> list[str]:
    """What is not used, with the recipe's key that decides it, if there is one."""
    same, instead = _same(config), _instead(config)
    lines: dict[str, None] = {}
    for found in values:
        if found.key in same:
            continue
        section = found.key.partition(".")[0]
        ours = instead.get(found.key) or instead.get(section)
        if ours:
            lines[f"{found.key} {found.value} ({ours})"] = None
        else:
            lines[section] = None
    return list(lines)


def _same(config: TrainingConfig) -> dict[str, _Ours]:
    """The keys of the files that mean what a key of the recipe means."""
    adamw, precision = config.optimizer, f"training.precision is {config.precision}"

    def of(key: str, value: Any) -> _Ours:
        return _Ours(value, f"training.{key} is {value}")

    bf16, no = _Ours(config.precision != "fp32", precision), _Ours(False, precision)
    return {
        "gradient_clipping": of("optimizer.clip", adamw.clip),
        "train_batch_size": of("global_batch_size", config.global_batch_size),
        "train_micro_batch_size_per_gpu": of("micro_batch_size", config.micro_batch_size),
        "bf16.enabled": bf16,
        "bfloat16.enabled": bf16,
        "fp16.enabled": no,
        "amp.enabled": no,
        "optimizer.type": _Ours("AdamW", "training.optimizer is AdamW"),
        "optimizer.params.adam_w_mode": _Ours(True, "training.optimizer is AdamW"),
        "optimizer.params.lr": of("optimizer.learning_rate", adamw.learning_rate),
        "optimizer.params.betas": _Ours(
            [adamw.beta1, adamw.beta2],
            f"training.optimizer has beta1 {adamw.beta1} and beta2 {adamw.beta2}",
        ),
        "optimizer.params.eps": of("optimizer.epsilon", adamw.epsilon),
        "optimizer.params.weight_decay": of("optimizer.weight_decay", adamw.weight_decay),
    }


def _instead(config: TrainingConfig) -> dict[str, str]:
    """What the recipe says instead of a key, or of a section, that means something similar."""
    return {
        "gradient_accumulation_steps": f"training.global_batch_size {config.global_batch_size}",
        "scheduler": f"training.schedule.shape {config.schedule.shape}",
        "activation_checkpointing": (
            f"training.activation_checkpointing {config.activation_checkpointing}"
        ),
        "dynamo_config": f"training.compile {str(config.compile).lower()}",
    }


def _equal(theirs: Any, ours: Any) -> bool:
    """Whether two values are equal; accelerate's come as text."""
    if isinstance(ours, list):
        return (
            isinstance(theirs, list) and len(theirs) == len(ours) and all(map(_equal, theirs, ours))
        )
    if isinstance(ours, bool):
        return str(theirs).lower() == str(ours).lower()
    if isinstance(ours, str):  # DeepSpeed's Adam decays like AdamW unless adam_w_mode says no
        return str(theirs).lower() in (ours.lower(), ours.lower().removesuffix("w"))
    try:
        return math.isclose(float(theirs), ours)
    except (TypeError, ValueError):
        return False
