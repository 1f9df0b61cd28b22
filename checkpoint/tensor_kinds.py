"""What a tensor is and which decoder layer it belongs to, judged by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.writer import CheckpointLayout
from cpt_merge.core.errors import UserError

Kind = Literal[
    "attention",
    "linear_attn",
    "mamba",
    "mixer",
    "mlp",
    "experts",
    "router",
    "norm",
    "embed",
    "head",
    "vision",
    "audio",
    "projector",
    "other",
]

OTHER_MODALITIES: tuple[Kind, ...] = ("vision", "audio", "projector")
"""Kinds outside the text decoder: towers, and what connects them to it."""

# the first pattern that is found decides; a projector may be inside a tower
_MODALITIES: list[tuple[Kind, re.Pattern[str]]] = [
    (
        "projector",
        re.compile(
            r"(^|\.)(\w*projector|\w*aligner|\w*resampler\w*|\w*connector|\w*merger\w*|qformer"
            r"|(multi)?modal(ity)?_projection"
            r"|(vision|visual|image|img|audio|speech|language|image_to_text)_proj(ection)?(_\w+)?"
            r"|(up|down)_proj_for_(speech|vision_speech)|vision_(language_)?adapter|mm_\w+"
            r"|image_pooling_2d|image_newline|view_sepe?rator|embed_(vision|audio)|glb_GN|sub_GN"
            r"|(global|sub)_img_feature_extensor|query_tokens)(\.|$)|^(model\.)?mlp1\."
        ),
    ),
    (
        "audio",
        re.compile(
            r"(^|\.)(audio|speech|acoustic|codec|talker|token2wav|code2wav|tts|apm"
            r"|semantic_tokenizer|word_timestamp)(_\w+)?(\.|$)"
            r"|^(model\.)?encoder\.(input_linear|out|out_mid"
            r"|layers\.\d+\.(ff1|ff2|conv|attn|post_norm))\."
        ),
    ),
    (
        "vision",
        re.compile(
            r"(^|\.)((high_res_)?vision|visual|image|img|video|vit|vpm|vqmodel|generation"
            r")(_\w+)?(\.|$)"
        ),
    ),
]
_KINDS: list[tuple[Kind, re.Pattern[str]]] = [
    (
        "embed",
        re.compile(
            r"(^|\.)(embed_tokens(_per_layer)?|wte|embed_in|word_embeddings|tok_embeddings"
            r"|tokens_embed|embeddings|shared)\.weight$"
        ),
    ),
    (
        "head",
        re.compile(
            r"(^|\.)(lm_head|embed_out|output|output_layer)\.(weight|bias)$|^head\."
            r"|(^|lm_head\.|predictions\.)decoder\.(weight|bias)$"
        ),
    ),
    ("norm", re.compile(r"(norm\w*|\.ln_?\w+)\.(weight|bias)$")),
    (
        "router",
        re.compile(
            r"\.(router|shared_expert_gate|moe_statics)\."
            r"|\.(mlp|moe|block_sparse_moe|feed_forward|ffn|mixer)\.(gate|wg|expert_bias)(\.|$)"
            r"|\.e_score_correction_bias$"
        ),
    ),
    (
        "experts",
        re.compile(r"\.(shared_)?experts?\.|\.(mlp|moe|block_sparse_moe)\.(input|output)_linear\."),
    ),
    ("linear_attn", re.compile(r"\.(linear_attn|linear_attention|delta_net|temporal_block)\.")),
    ("mamba", re.compile(r"\.(mamba|mamba_decoder|ssm)\.")),
    ("mixer", re.compile(r"\.(mixer|conv|short_conv)\.")),
    (
        "mlp",
        re.compile(
            r"\.(\w*mlp|feed_forward|ffn|block_sparse_moe|moe)\.|\.(fc1|fc2)\.|cross_attn_mlp_gate$"
        ),
    ),
    (
        "attention",
        re.compile(
            r"\.((self_|cross_|inter_)?attn|(self_|inter)?attention|encoder_attn)\."
            r"|cross_attn_attn_gate$"
        ),
    ),
]
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")
_PREDICTION = re.compile(r"(^|\.)(mtp\w*|nextn\w*)\.")


def kind_of(name: str) -> Kind:
    """The module kind of a tensor."""
    other = next((kind for kind, pattern in _MODALITIES if pattern.search(name)), None)
    if other is not None:
        return other
    found: Kind = next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")
    inside = layer_of(name) is not None or _PREDICTION.search(name) is not None
    return "other" if inside and found in ("embed", "head") else found


def is_by_token(name: str) -> bool:
    """Whether a tensor has one row per token."""
    return kind_of(name) in ("embed", "head")


def layer_of(name: str) -> int | None:
    """The text decoder's layer of a tensor; None for tensors outside these layers."""
    if _PREDICTION.search(name) or any(pattern.search(name) for _, pattern in _MODALITIES):
        return None
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def count_layers(names: Iterable[str]) -> int:
    """How many layers of the text decoder the tensors belong to."""
    return max((layer + 1 for name in names if (layer := layer_of(name)) is not None), default=0)


def is_per_layer_table(name: str) -> bool:
    """Whether this is a further table by token, for the layers (Gemma 3n), not the embedding."""
    return name.endswith("embed_tokens_per_layer.weight")


def embedding_of(checkpoint: Checkpoint) -> str | None:
    """The name of the embedding matrix; None if no name is known."""
    names = (name for name in checkpoint.tensors if kind_of(name) == "embed")
    return next((name for name in names if not is_per_layer_table(name)), None)


def heads_of(checkpoint: Checkpoint | CheckpointLayout) -> list[str]:
    """The names of the matrices that make logits; a bias of the head is none."""
    return [
        name
        for name, info in checkpoint.tensors.items()
        if kind_of(name) == "head" and len(info.shape) == 2
    ]


def vocabulary_rows(checkpoint: Checkpoint) -> int:
    """Rows of the embedding matrix. Raises `UserError` if there is none."""
    name = embedding_of(checkpoint)
    if name is None:
        raise UserError(
            f"{checkpoint.directory} contains no embedding matrix with a known name; report its "
            "tensor names."
        )
    return checkpoint.tensors[name].shape[0]


def is_routed(name: str) -> bool:
    """Whether a tensor belongs to experts that routers choose among, not to shared ones."""
    return kind_of(name) == "experts" and "shared_expert" not in name


def routed_parameters(sizes: Mapping[str, int]) -> int:
    """Parameters of the experts that routers choose among. `sizes` are those of all tensors."""
    return sum(size for name, size in sizes.items() if is_routed(name))
