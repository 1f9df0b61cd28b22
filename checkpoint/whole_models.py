"""Whether the files of a checkpoint hold every tensor of the class that loads them.

transformers fills what the files lack with random values. Towers and projectors are not in memory
while a text decoder is trained or merged, so only the whole class, on the meta device, tells what a
wrapper lacks.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

from cpt_merge.checkpoint.loaded import is_computed, is_tied, written_config
from cpt_merge.checkpoint.model_names import StoredTensors, find_stored
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.text_models import config_of
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import counted, say_once


def check_whole(checkpoint: Checkpoint) -> None:
    """Raise `UserError` that names a tensor that the files lack, or hold in another shape.

    One line names tensors that the class does not have, and a class that cannot be built here.
    """
    model = _whole_model(checkpoint)
    if model is None:
        return
    directory, architecture = checkpoint.directory, type(model).__name__
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    found = find_stored(model, shapes, directory)
    missing = _missing(model, found)
    if missing:
        name = found.likely_name(model, missing[0])
        more = f" and {len(missing) - 1} other tensors" if missing[1:] else ""
        raise UserError(
            f"{directory} lacks {name}{more} of {architecture}, which transformers would fill with "
            "random values; copy or download the model again."
        )
    for name, tensor in model.state_dict().items():
        found.check_shape(name, tensor.shape, directory)
    _say_unknown(checkpoint, model, found)


def _whole_model(checkpoint: Checkpoint) -> Any | None:
    """The class that transformers loads the files with, without memory; None if it is not here."""
    try:
        config = config_of(written_config(checkpoint.config, is_tied(checkpoint)))
        with torch.device("meta"):
            return _class_of(config)(config)
    except Exception as error:  # each family fails in its own way
        say_once(
            f"{checkpoint.directory}: transformers cannot build this model here "
            f"({_first_line(error)}), so whether its files hold all tensors is not checked"
        )
        return None


def _class_of(config: Any) -> Any:
    """The class with towers, unless config.json names the one of the text decoder alone.

    For a model that writes no text (a classifier) it is what config.json names.
    """
    named = config.architectures or [type(config).__name__]
    mappings = MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
    known = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    if not known:
        return getattr(transformers, named[0])
    return next((one for one in known if one.__name__ in named), known[0])


def _missing(model: Any, found: StoredTensors) -> list[str]:
    """The model's tensors that are stored under none of their names; a tied one has several."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    held = {id(state[name]) for name in (*found.names, *found.rearranged) if name in state}
    unneeded = [re.compile(one) for one in model._keys_to_ignore_on_load_missing or ()]
    return [
        name
        for name, tensor in state.items()
        if id(tensor) not in held
        and (isinstance(tensor, nn.Parameter) or not is_computed(name, tensor.shape))
        and not any(pattern.search(name) for pattern in unneeded)
    ]


def _say_unknown(checkpoint: Checkpoint, model: Any, found: StoredTensors) -> None:
    ignored = [re.compile(one) for one in model._keys_to_ignore_on_load_unexpected or ()]
    unknown = sorted(
        name
        for name in checkpoint.tensors.keys() - found.used
        if not any(pattern.search(name) for pattern in ignored)
    )
    if unknown:
        say_once(
            f"{checkpoint.directory}: {counted(len(unknown), 'tensor')} ({unknown[0]}"
            f"{', ...' if unknown[1:] else ''}) unknown to {type(model).__name__} stay as they are"
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
