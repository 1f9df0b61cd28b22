"""Names of tensors without what wrappers put in front of them.

A model that was saved while it was compiled, distributed, or wrapped by PEFT has other names than
the model itself: `_orig_mod.model.norm.weight`, `module.model.norm.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from cpt_merge.checkpoint.headers import TensorInfo
from cpt_merge.core.errors import UserError

_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_FIRST = re.compile(r"^((_forward_module|module|base_model\.model)\.)+")


def plain_name(name: str) -> str:
    """The name without wrappers."""
    return _FIRST.sub("", _WRAPPERS.sub("", name))


def plain_names(directory: Path, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Stored tensors by their plain names. Raises `UserError` if two have the same."""
    found: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        plain = plain_name(name)
        if plain in found:
            raise UserError(
                f"{directory} contains {plain} under two names, {found[plain].name} and {name}; "
                "save the model again without the wrapper."
            )
        found[plain] = info
    return found
