"""The text decoder of a wrapper as a checkpoint of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cpt_merge.checkpoint.headers import TensorInfo
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.tensor_kinds import OTHER_MODALITIES, embedding_of, heads_of, kind_of
from cpt_merge.core.errors import UserError

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def has_towers(checkpoint: Checkpoint) -> bool:
    """Whether a model has more than a text decoder."""
    return any(kind_of(name) in OTHER_MODALITIES for name in checkpoint.tensors)


def text_only(wrapper: Checkpoint) -> Checkpoint:
    """The decoder and the head of a wrapper, with the names and the config.json of a text model.

    Raises `UserError` for a model without towers, and for a decoder that transformers has no class
    for.
    """
    from cpt_merge.checkpoint.text_models import text_model_within  # imports transformers

    if not has_towers(wrapper):
        raise UserError(
            f"models.text_only leaves out towers, and {wrapper.directory} has none; remove that "
            "key."
        )
    embedding, model = embedding_of(wrapper), text_model_within(wrapper.config)
    if model is None or embedding is None or not embedding.endswith(model.embedding):
        raise UserError(
            f"transformers has no class for the text decoder of {wrapper.directory} alone, which "
            "models.text_only asks for; remove that key."
        )
    body = embedding.removesuffix(model.embedding)
    heads = [head.removesuffix("weight") for head in heads_of(wrapper)]
    tensors: dict[str, TensorInfo] = {}
    for name, info in wrapper.tensors.items():
        head = next((head for head in heads if name.startswith(head)), None)
        if head is not None:
            tensors[model.head + name.removeprefix(head)] = info
        elif name.startswith(body) and kind_of(name) not in OTHER_MODALITIES:
            tensors[model.body + name.removeprefix(body)] = info
    stated = _with_ids_of(wrapper.config, model.config)
    return replace(wrapper, tensors=tensors, stated=stated)


def _with_ids_of(wrapper: Mapping[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """The text model's config.json, with what only the wrapper's states."""
    ids = {name: wrapper[name] for name in _SPECIAL_IDS if wrapper.get(name) is not None}
    dtype = {name: wrapper[name] for name in ("torch_dtype", "dtype") if name in wrapper}
    return {**dtype, **ids, **text}
