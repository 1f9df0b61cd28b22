"""What a tensor is, judged by its name, and which tensors of a checkpoint a loader uses."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from cpt_merge.checkpoint.headers import TensorInfo
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.errors import UserError

Kind = Literal["attention", "mlp", "norm", "embed", "head", "other"]

# the first pattern that is found decides: q_norm is inside self_attn
_PATTERNS: list[tuple[Kind, re.Pattern[str]]] = [
    ("embed", re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.")),
    ("head", re.compile(r"(^|\.)(lm_head|embed_out|output)\.(weight|bias)$")),
    ("norm", re.compile(r"(norm\w*|ln_\w+)\.(weight|bias)$")),
    ("attention", re.compile(r"\.(self_attn|attn|attention|self_attention)\.")),
    ("mlp", re.compile(r"\.(mlp|feed_forward|ffn|block_sparse_moe|experts)\.")),
]
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def kind_of(name: str) -> Kind:
    """The module kind of a tensor."""
    found: Kind = next((kind for kind, pattern in _PATTERNS if pattern.search(name)), "other")
    return "other" if found == "head" and layer_of(name) is not None else found


def is_by_token(name: str) -> bool:
    """Whether a tensor has one row per token."""
    return kind_of(name) in ("embed", "head")


def layer_of(name: str) -> int | None:
    """The decoder layer of a tensor; None for tensors outside the layers."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def count_layers(names: Iterable[str]) -> int:
    """How many decoder layers the tensors belong to."""
    return max((layer + 1 for name in names if (layer := layer_of(name)) is not None), default=0)


def is_tied(checkpoint: Checkpoint) -> bool:
    """Whether the head is the embedding: as config.json says, else if no head is stored."""
    tied = checkpoint.config.get("tie_word_embeddings")
    if tied is not None:
        return bool(tied)
    return not any(kind_of(name) == "head" for name in checkpoint.tensors)


def model_tensors(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """The tensors that a loader uses.

    Left out are a head that is stored although it is tied, and the rotary frequencies in old
    conversions of LLaMA, which loaders compute themselves.
    """
    tied = is_tied(checkpoint)
    return {
        name: info
        for name, info in checkpoint.tensors.items()
        if not (tied and kind_of(name) == "head") and not name.endswith("rotary_emb.inv_freq")
    }


def vocabulary_rows(checkpoint: Checkpoint) -> int:
    """Rows of the embedding matrix. Raises `UserError` if there is none."""
    for name, info in checkpoint.tensors.items():
        if kind_of(name) == "embed":
            return info.shape[0]
    raise UserError(
        f"{checkpoint.directory} contains no embedding matrix with a known name; report its tensor "
        "names."
    )
