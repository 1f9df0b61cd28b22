"""Models of transformers that write text: which class loads them, and where their text decoder is.

A *wrapper* is a model of images or sound around a text decoder: its configuration has a section
for the decoder, and next to the decoder it has towers and what connects them to it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
)

from cpt_merge.core.artifact import write_json


def config_of(values: Mapping[str, Any]) -> Any:
    """The configuration of transformers with the values of a config.json; raises what it raises.

    Its reader is asked, which knows how infinity is written in JSON (Nemotron-H's time steps).
    """
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", dict(values))
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def auto_class(config: Any) -> Any:
    """The automatic class of transformers for a model that writes text; None for another model.

    Some families of wrappers have a class for their text decoder alone, which reads it from the
    wrapper's files; that one is taken.
    """
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    return AutoModelForMultimodalLM if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING else None


def is_wrapper(model: Any) -> bool:
    """Whether a model has more than a text decoder and its head."""
    return model.config.get_text_config(decoder=True) is not model.config


def with_attention(config: Any, attention: str) -> Any:
    """A copy of a configuration whose text decoder has an attention, by transformers' name.

    Towers, which may not support it, keep their own.
    """
    copied = deepcopy(config)
    copied.get_text_config(decoder=True)._attn_implementation = attention
    return copied


def text_decoder(model: Any) -> Any:
    """The module that makes hidden states of token ids: it contains the layers and no head.

    `get_decoder` of some classes returns a model with its head (BLIP-2), or the model itself
    (Llama 4).
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    decoder = model.get_decoder()
    while head is not None and any(part is head for part in decoder.modules()):
        inner = next((m for m in decoder.children() if _contains(m, embedding)), None)
        if inner is None or inner is embedding:
            return decoder
        decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
    return decoder


@dataclass(frozen=True)
class TextModel:
    """A class of transformers for a text decoder and its head: config.json, and names in files."""

    config: dict[str, Any]
    body: str  # prefix of the decoder's tensors
    head: str  # prefix of the head's
    embedding: str  # without the prefix of the decoder


def text_model_within(config: Mapping[str, Any]) -> TextModel | None:
    """The text model that a wrapper's config.json contains; None if transformers has no class."""
    wrapper = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    text = wrapper.get_text_config(decoder=True)
    if text is wrapper or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text, trust_remote_code=False)
    names = {id(part): name for name, part in model.named_modules()}
    body = f"{names[id(text_decoder(model))]}."
    return TextModel(
        {**text.to_diff_dict(), "architectures": [type(model).__name__]},
        body,
        f"{names[id(model.get_output_embeddings())]}.",
        f"{names[id(model.get_input_embeddings())]}.weight".removeprefix(body),
    )


def keep_text_decoder(wrapper: Any) -> None:
    """Remove towers, projectors and their parameters from a wrapper, which takes text alone then.

    Its text decoder and its head keep their names.
    """
    kept = [text_decoder(wrapper), wrapper.get_output_embeddings()]
    kept.append(wrapper.get_input_embeddings())
    for part in _around(wrapper, kept):
        for name, child in list(part.named_children()):
            if not any(_contains(child, one) for one in kept):
                setattr(part, name, None)
        for name, _ in list(part.named_parameters(recurse=False)):
            setattr(part, name, None)


def _around(module: nn.Module, kept: list[nn.Module]) -> list[nn.Module]:
    """The modules that contain one of the kept ones and are within none."""
    if any(module is one for one in kept):
        return []
    inside = [child for child in module.children() if any(_contains(child, one) for one in kept)]
    return [module, *(part for child in inside for part in _around(child, kept))]


def _contains(module: nn.Module, part: nn.Module) -> bool:
    return any(one is part for one in module.modules())
