"""The architecture of a model in small, with random weights: what it takes to try something."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModel, AutoModelForCausalLM

from cpt_merge.checkpoint.text_models import text_decoder

TOKENS = 24  # of a sequence that a small model is tried with
_FACTORS = (64, 32, 16, 8, 4, 2, 1)
_WIDTH = 32  # of the narrowest model that is tried
_MULTIPLE = 8  # of all widths, for grouped matmuls
_LARGEST = 100e6  # parameters of a model that still counts as small
_VOCABULARY = 64
_EXPERTS = 8
_SEEN = ("window", "attention_chunk", "index_topk", "budget")  # how many tokens a token sees
_GROUPED = ("block_size", "pool", "topk_blocks")  # how many are chosen together, and such groups
_SCALED = ("size", "dim", "width", "heads", "n_head", "d_model", "embd", "inner", "groups", "d_ssm")
_COUNTS = ("heads", "n_head", "groups")
_KEPT = (
    "vocab",
    "head_dim",
    "headdim",
    "d_head",
    "kernel",
    "conv",
    "window",
    "chunk",
    "state",
    "max_",
)
_INDEXERS = "index"  # with few heads, those of a sparse attention often give equal scores


def small_config(decoder: Any, sequence_length: int) -> Any | None:
    """The configuration of a small model of a decoder's architecture, or None if none is found.

    It has the kinds of layers that the decoder has, as few as that takes, and is narrower. Where a
    token of a sequence of training sees only some of the others (windows, sparse attention), so do
    tokens of the small one's. Families tie their sizes together in their own ways, so several are
    tried, the narrowest first, until a model runs. The parameters of the decoder may be on the meta
    device.
    """
    whole = decoder.config.get_text_config(decoder=True)
    settings = whole.to_dict()
    width = int(getattr(whole, "hidden_size", None) or _WIDTH)
    factors = [factor for factor in _FACTORS if factor == 1 or width // factor >= _WIDTH]
    limited = _limited(settings, sequence_length)
    for start, factor, layers, experts, kept in itertools.product(
        (limited, settings) if limited != settings else (settings,),
        factors,
        _depths(decoder, whole),
        (_EXPERTS, None),
        ((*_KEPT, _INDEXERS), _KEPT) if any(_INDEXERS in name for name in settings) else (_KEPT,),
    ):
        try:
            config = type(whole).from_dict(_narrowed(start, factor, layers, experts, kept))
            if _parameters(config) < _LARGEST and _runs(small_decoder(config, "eager")):
                return config
        except Exception:  # of the family's own code: any kind
            continue
    return None


def _parameters(config: Any) -> int:
    with torch.device("meta"):
        model = _auto_class(config).from_config(config, trust_remote_code=False)
    return sum(parameter.numel() for parameter in model.parameters())


def _auto_class(config: Any) -> Any:
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel


@torch.no_grad()
def _runs(decoder: Any) -> bool:
    ids = torch.arange(2 * TOKENS).view(2, TOKENS) % _VOCABULARY
    positions = torch.arange(TOKENS).expand(2, TOKENS)
    output = decoder(input_ids=ids, position_ids=positions, use_cache=False)
    return bool(output.last_hidden_state.isfinite().all())


def small_decoder(config: Any, attention: str) -> Any:
    """A text decoder with random weights, always the same ones, on the CPU.

    `attention` is transformers' name.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _auto_class(config).from_config(
            config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
        )
        for parameter in model.parameters():  # far from uniform, so that every influence shows
            mean, std = (
                (0.5, 0.3) if parameter.ndim < 2 else (0.0, 1.7 * parameter.shape[-1] ** -0.5)
            )
            nn.init.normal_(parameter, mean=mean, std=std)
    return text_decoder(model.eval())


def _depths(decoder: Any, config: Any) -> list[int]:
    """How many first layers contain every kind of layer once, and twice; and the number of all."""
    lists = [part for part in decoder.children() if isinstance(part, nn.ModuleList)]
    layers = max(lists, key=len, default=nn.ModuleList())
    named = getattr(config, "layer_types", None) or [None] * len(layers)
    seen: Counter[Any] = Counter()
    depths = {1: 2, 2: 2}
    for number, (layer, name) in enumerate(zip(layers, named, strict=False), 1):
        kind = (name, type(layer), *((child, type(part)) for child, part in layer.named_children()))
        seen[kind] += 1
        if seen[kind] in depths:
            depths[seen[kind]] = max(depths[seen[kind]], number)
    return sorted({*depths.values(), len(layers)})


def _limited(settings: Mapping[str, Any], sequence_length: int) -> dict[str, Any]:
    """A config.json in which a token of a small model sees as little as one of training would."""

    def limit(name: str, value: Any) -> Any:
        if type(value) is not int or not 0 < value < sequence_length:
            return value
        if any(part in name for part in _GROUPED):
            return min(value, 2)
        seen = any(part in name for part in _SEEN) and "layer" not in name
        return min(value, 4) if seen else value

    return {name: limit(name, value) for name, value in settings.items()}


def _narrowed(
    settings: Mapping[str, Any],
    factor: int,
    layers: int,
    experts: int | None,
    kept: Sequence[str],
) -> dict[str, Any]:
    """A config.json with its widths divided by `factor`, its first layers and fewer experts.

    Widths whose names contain one of `kept` stay.
    """
    total = settings.get("num_hidden_layers")
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, list | str) and len(value) == total and total:
            value = value[:layers]
            if isinstance(value, list) and all(type(one) is int for one in value):
                value = [_narrowed_number(name, one, factor, experts, kept) for one in value]
        elif isinstance(value, list) and value and all(type(one) is int for one in value):
            value = (
                [one for one in value if one < layers] if _numbers_layers(value, total) else value
            )
        elif type(value) is int:
            value = _narrowed_number(name, value, factor, experts, kept)
        found[name] = value
    counts = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    return {**found, **{name: layers for name in counts if name in found}, "pad_token_id": None}


def _numbers_layers(values: list[int], layers: Any) -> bool:
    return isinstance(layers, int) and values == sorted(set(values)) and values[-1] < layers


def _narrowed_number(
    name: str, value: int, factor: int, experts: int | None, kept: Sequence[str]
) -> int:
    if "vocab" in name:
        return min(value, _VOCABULARY)
    if experts and name in ("n_group", "topk_group"):  # of experts
        return 1
    if experts and "expert" in name and "size" not in name:
        return min(value, 2 if "per_tok" in name or "topk" in name else experts)
    if not any(part in name for part in _SCALED) or any(part in name for part in kept):
        return value
    multiple = 1 if any(part in name for part in _COUNTS) else _MULTIPLE
    while factor > 1 and value % (factor * multiple):
        factor //= 2
    return value // factor
