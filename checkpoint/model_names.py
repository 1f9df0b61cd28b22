"""Under which name a checkpoint holds what a model of transformers calls by another."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from cpt_merge.core.errors import UserError


def stored_names(model: Any, tensors: Iterable[str], directory: Path) -> dict[str, str]:
    """The model's name -> the checkpoint's name, of every tensor of the checkpoint that is part of the model.

    Names differ where transformers renames when it loads (GPT-NeoX: `embed_out` is `lm_head`), or where the decoder
    was saved alone (GPT-2: `wte` is `transformer.wte`). Raises `UserError` for tensors that it rearranges as well.
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
                f"{directory} holds {stored}, which transformers rearranges into {name} of {type(model).__name__} when "
                "it loads it; such models cannot be trained here."
            )
        name = name if name in state else stored
        if name in state:
            found[name] = stored
    return found
