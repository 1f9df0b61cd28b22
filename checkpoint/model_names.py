"""Compatibility: the names under which a checkpoint stores the tensors of a transformers model.

Uses `conversion_mapping` and `core_model_loading` of transformers, which are not a documented API.
Tested with transformers 5.23.0.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from cpt_merge.core.errors import UserError


def stored_names(model: Any, tensors: Iterable[str], directory: Path) -> dict[str, str]:
    """The model's name -> the checkpoint's name, for every tensor of the checkpoint in the model.

    Names differ if transformers renames tensors when it loads them (GPT-NeoX: `embed_out` is
    `lm_head`), or if the decoder was saved alone (GPT-2: `wte` is `transformer.wte`). Raises
    `UserError` for tensors that transformers also rearranges.
    """
    state, mapping = model.state_dict(), get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    found = {}
    for stored in tensors:
        name, pattern = rename_source_key(
            stored, renamings, converters, model.base_model_prefix, state
        )
        if pattern is not None and name in state:
            raise UserError(
                f"{directory} contains {stored}, which transformers rearranges into {name} of "
                f"{type(model).__name__} when it loads it; such models cannot be trained here."
            )
        name = name if name in state else stored
        if name in state:
            found[name] = stored
    return found
