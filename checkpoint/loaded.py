"""A checkpoint as loaders see it: without tensors that they ignore, its head tied or not.

Every stage opens models here, so that all of them agree on which tensors a model has.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cpt_merge.checkpoint.dtypes import FLOATS
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.tensor_kinds import (
    OTHER_MODALITIES,
    count_layers,
    embedding_of,
    heads_of,
    kind_of,
    layer_of,
)
from cpt_merge.checkpoint.text_sections import TEXT_SECTIONS
from cpt_merge.checkpoint.tie_defaults import UNTIED
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say_once

_OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "d_ff"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "n_ctx"),
}
_PREFIXES = re.compile(r"^((model|language_model|text_model|transformer|thinker|llm)\.)+")
_AROUND_BODY = re.compile(r"^(.+\.)model\.\w+\.weight$")
_TIE = "tie_word_embeddings"
_BLOCK = 1 << 20  # elements compared at a time
_MASK = re.compile(r"\.(attn|attention|self_attention|crossattention)\.(bias|masked_bias)$")
_COMPUTED = re.compile(
    r"(?<!rotary_embeddings\.)inv_freq$|(^|\.)position_ids$|\.token_type_ids$"
    r"|rotary\w*\.(cos|sin)\w*$|\.attn\.(embed_positions|causal_mask)$|\.embed_scale$"
    r"|\.mup_vector$|^model\.normalizer$|(^|\.)(en|de)coder\.version$|\._extra_state$"
)
_EMBEDDING_PART = re.compile(r"((en|de)coder\.)?(embeddings\.)?\w+\.weight$")
_LAYER_STACK = re.compile(r"^(.*?)(?:encoder\.|decoder\.)?(?:layers|h|blocks|block|layer)\.\d+\.")
_ENCODER_DECODER = ("is_encoder_decoder", "decoder_layers", "num_decoder_layers")
_PREDICTION = re.compile(r"(^|\.)mtp(_\w+)?\.")
_PREDICTION_COUNTS = (
    "num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules",
)  # fmt: skip
_PREDICTION_PART = re.compile(r"\.(enorm|hnorm|eh_proj|shared_head|embed_tokens)\b")


def open_model(directory: Path, base: Path | None = None) -> Checkpoint:
    """Open a model as loaders see it, a LoRA adapter of `base` too.

    Raises `UserError` if it is damaged or lacks its head.
    """
    return loaded(Checkpoint.open(directory, base=base))


def has_weights(directory: Path) -> bool:
    """Whether a directory has files of weights; a tokenizer's has none."""
    return any(next(directory.glob(kind), None) for kind in ("*.safetensors", "pytorch_model*.bin"))


def loaded(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the tensors that loaders use; one line names the others.

    A stored head that equals the embedding is left out if it is tied. One that differs is kept
    whatever config.json says, as transformers does when it loads the model.
    """
    ignored = _ignored(checkpoint)
    if ignored:
        say_once(
            f"{checkpoint.directory}: left out {_named(ignored)}, because transformers does not "
            "load them"
        )
    kept = {name: info for name, info in checkpoint.tensors.items() if name not in ignored}
    _check_text_decoder(checkpoint)
    return _with_head_as_loaded(replace(checkpoint, tensors=kept))


def _check_text_decoder(checkpoint: Checkpoint) -> None:
    """Raise `UserError` for towers without a text decoder."""
    kinds = Counter(kind_of(name) for name in checkpoint.tensors)
    towers = {kind: kinds[kind] for kind in OTHER_MODALITIES if kinds[kind]}
    if towers and not kinds["embed"] and not count_layers(checkpoint.tensors):
        counts = " and ".join(f"{count} tensors of {kind}" for kind, count in towers.items())
        raise UserError(
            f"{checkpoint.directory} contains {counts} and no text decoder; use a complete "
            "checkpoint of the model, or the text model that belongs to it."
        )


def refuse_image_layers(config: Mapping[str, Any], directory: Path) -> None:
    """Raise `UserError` for a text decoder with layers that text alone does not use (Mllama)."""
    if text_section(config).get("cross_attention_layers"):
        raise UserError(
            f"the text decoder in {directory} has layers for images alone (cross_attention_layers),"
            " through which no text passes; such models cannot be trained."
        )


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the head of a loaded checkpoint is its embedding."""
    return not heads_of(checkpoint)


def with_head(checkpoint: Checkpoint, head: str) -> Checkpoint:
    """A tied checkpoint with its embedding as a head of this name as well."""
    name = embedding_of(checkpoint)
    if name is None or heads_of(checkpoint):
        return checkpoint
    alias = replace(checkpoint.tensors[name], name=head)
    return replace(checkpoint, tensors={**checkpoint.tensors, head: alias})


def named_like(checkpoint: Checkpoint, names: Collection[str]) -> Checkpoint:
    """The checkpoint with the names of another one for the same tensors; one line says so.

    Versions of transformers, and models with and without towers, put different prefixes in front of
    the same names: `model.layers.`, `language_model.model.layers.`, `model.language_model.layers.`.
    """
    known = {_core_name(name): name for name in names}
    distinct = len(known) == len(names)
    known = {**_head_like(checkpoint, names), **known}
    renamed = {
        name: known.get(_core_name(name), name) if name not in names else name
        for name in checkpoint.tensors
    }
    changed = [name for name, new in renamed.items() if new != name]
    if not changed or not distinct or len(set(renamed.values())) < len(renamed):
        return checkpoint
    say_once(
        f"{checkpoint.directory}: {changed[0]} is taken as {renamed[changed[0]]} of the other "
        f"model, and {len(changed) - 1} others alike"
    )
    tensors = {renamed[name]: info for name, info in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors)


def _core_name(name: str) -> str:
    return _PREFIXES.sub("", name)


def _head_like(checkpoint: Checkpoint, names: Collection[str]) -> dict[str, str]:
    """The core name of the checkpoint's head -> its name next to the embedding in `names`.

    For a tied model, which has no head, where the two have other prefixes: a head is within what is
    around the decoder's `model.`, as in `language_model.model.embed_tokens` and
    `language_model.lm_head`.
    """
    embedding, heads = embedding_of(checkpoint), heads_of(checkpoint)
    core = _core_name(embedding or "")
    theirs = next((name for name in names if _core_name(name) == core), None)
    if theirs is None or theirs == embedding or not heads:
        return {}
    around = _AROUND_BODY.match(theirs)
    return {_core_name(heads[0]): f"{around[1] if around else ''}{_core_name(heads[0])}"}


def written_config(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """A config.json of the tensors that loaders use: it counts no blocks that predict further
    tokens, and says in all places whether the head is tied.

    One that denies a tie stays as it is if there is no head, because such a model makes no logits.
    """
    denied = tied and _states_tie(config) is False
    return _written_section(config, {} if denied else {_TIE: tied})


def _written_section(config: Mapping[str, Any], stated: Mapping[str, bool]) -> dict[str, Any]:
    """A config.json, or a section of one, with its sections."""
    layers = config.get("num_hidden_layers")
    beyond = sum(config.get(name) or 0 for name in _PREDICTION_COUNTS)
    written = {
        name: value[:layers]  # per layer: some families count the blocks in these lists, too
        if isinstance(value, list) and beyond and len(value) == (layers or 0) + beyond
        else value
        for name, value in config.items()
    }
    written |= {name: type(config[name])() for name in _PREDICTION_COUNTS if config.get(name)}
    for section in TEXT_SECTIONS:
        if isinstance(config.get(section), dict):
            written[section] = _written_section(config[section], stated)
    return {**written, **stated}


def _states_tie(config: Mapping[str, Any]) -> bool | None:
    """What config.json says: tied if one place says so; None if none says anything."""
    sections = [config, *(config.get(name) or {} for name in TEXT_SECTIONS)]
    stated = [bool(section[_TIE]) for section in sections if _TIE in section]
    return any(stated) if stated else None


def _with_head_as_loaded(checkpoint: Checkpoint) -> Checkpoint:
    heads, stated = heads_of(checkpoint), _states_tie(checkpoint.config)
    embedding = embedding_of(checkpoint)
    if not heads:
        _check_tied(checkpoint, stated)
        return checkpoint
    if embedding is None:
        return checkpoint if stated is False else _embedding_from_head(checkpoint, heads[0])
    equal = [head for head in heads if stated is not False and _equal(checkpoint, embedding, head)]
    if stated and len(equal) < len(heads):
        other = next(head for head in heads if head not in equal)
        say_once(
            f"{checkpoint.directory}: {other} differs from {embedding}, although config.json ties "
            "them; it is kept as a head of its own, as transformers does"
        )
    tensors = {name: info for name, info in checkpoint.tensors.items() if name not in equal}
    return replace(checkpoint, tensors=tensors)


def _check_tied(checkpoint: Checkpoint, stated: bool | None) -> None:
    """Raise `UserError` if a model without a head makes logits and is not tied."""
    config, where = checkpoint.config, checkpoint.directory
    by_default = stated is None and config.get("model_type") in UNTIED
    if not _makes_logits(config) or not (by_default or stated is False):
        return
    unknown = _like_a_head(checkpoint)
    if unknown:
        raise UserError(
            f"{where} has no output head with a known name, and is not tied; {unknown[0]} may be "
            "one: report its tensor names."
        )
    reason = "although its config.json says that the head is not tied to the embedding"
    if by_default:
        family = config["model_type"]
        reason = f"and its config.json does not say that it is tied, which in {family} it is not"
    raise UserError(
        f"{where} has no output head, {reason}; use a complete checkpoint, "
        f"or set {_TIE} to true if it is tied."
    )


def _like_a_head(checkpoint: Checkpoint) -> list[str]:
    """Matrices of unknown kind that have the embedding's shape."""
    embedding = embedding_of(checkpoint)
    shape = checkpoint.tensors[embedding].shape if embedding else None
    return [
        name
        for name, info in checkpoint.tensors.items()
        if info.shape == shape and kind_of(name) == "other" and layer_of(name) is None
    ]


def _embedding_from_head(checkpoint: Checkpoint, head: str) -> Checkpoint:
    """A tied checkpoint in which only the head was stored, as loaders read it."""
    prefix = next((name.partition("layers.")[0] for name in checkpoint.tensors
                   if layer_of(name) is not None and "layers." in name), None)  # fmt: skip
    if prefix is None:
        return checkpoint
    name = f"{prefix}embed_tokens.weight"
    others = {other: info for other, info in checkpoint.tensors.items() if other != head}
    alias = replace(checkpoint.tensors[head], name=name)
    return replace(checkpoint, tensors={name: alias, **others})


def _makes_logits(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures") or []
    return any(str(name).endswith(("ForCausalLM", "ForConditionalGeneration")) for name in names)


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two matrices hold the same numbers."""
    first, second = checkpoint.tensors[one], checkpoint.tensors[other]
    if first.shape != second.shape or not {first.dtype, second.dtype} <= set(FLOATS):
        return False
    step = max(_BLOCK // max(first.row_size, 1), 1)
    return all(
        np.array_equal(
            checkpoint.read_float32(one, row, min(row + step, first.shape[0])),
            checkpoint.read_float32(other, row, min(row + step, first.shape[0])),
        )
        for row in range(0, first.shape[0], step)
    )


# --- what loaders ignore ---


def _ignored(checkpoint: Checkpoint) -> list[str]:
    """The stored tensors that transformers does not load.

    These are buffers that it computes (masks of attention, rotary tables, positions), and modules
    that it does not build: the prediction of further tokens (`mtp.`), and layers after the last one
    that config.json counts.
    """
    beyond = set(_layers_beyond(checkpoint))
    return [
        name
        for name, info in checkpoint.tensors.items()
        if layer_of(name) in beyond or _PREDICTION.search(name) or is_computed(name, info.shape)
    ]


def is_computed(name: str, shape: Sequence[int]) -> bool:
    """Whether transformers computes this buffer, so that it does not matter what files hold."""
    if _MASK.search(name):
        return name.endswith("masked_bias") or len(shape) > 2
    return _COMPUTED.search(name) is not None


def _layers_beyond(checkpoint: Checkpoint) -> Iterator[int]:
    """The numbers of layers after the text decoder's last one.

    Layers that are not next to the embedding are counted only if they predict further tokens: they
    may belong to a tower. The two halves of an encoder-decoder have a count each.
    """
    text = text_section(checkpoint.config)
    count = text.get("num_hidden_layers")
    if not isinstance(count, int):
        return
    embedding = embedding_of(checkpoint)
    halves = any(text.get(name) for name in _ENCODER_DECODER)
    body = _EMBEDDING_PART.sub("", embedding) if embedding and not halves else None
    for name in checkpoint.tensors:
        layer = layer_of(name)
        if layer is not None and layer >= count:
            stack = _LAYER_STACK.match(name)
            beside = stack is not None and stack[1] == body
            if beside or _PREDICTION_PART.search(name):
                yield layer


def text_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the text decoder, by the names that most families use."""
    found = dict(config)
    for section in TEXT_SECTIONS:
        if isinstance(config.get(section), dict):
            found |= text_section(config[section])
    for name, others in _OTHER_NAMES.items():
        if found.get(name) is None:
            known = [found[other] for other in others if found.get(other) is not None]
            found |= {name: known[0]} if known else {}
    return found


def _named(names: list[str]) -> str:
    plural = "s" if len(names) > 1 else ""
    return f"{len(names)} tensor{plural} ({names[0]}{', ...' if plural else ''})"
