"""A small Llama family: base, its chat sibling and a CPT model, each with its own tokenizer.

The vocabularies differ on purpose. Base: 3 specials, 26 letters, merges, `<|eot|>` that base never
trained; 2 padding rows. Chat: the same and `<|im_start|>`, at an id that CPT gives to a new piece.
CPT: base's pieces at their ids, 5 new pieces, `<|im_start|>` elsewhere, padding to a multiple of
16.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cpt_merge.checkpoint.vocabulary_map import ChatToken, NewPiece, VocabularyMap
from cpt_merge.merge import files
from cpt_merge.tracking import Tracker
from tests.recording import Recording

HIDDEN, LAYERS, MIDDLE = 32, 2, 48
LETTERS = [chr(ord("a") + number) for number in range(26)]
MERGED = ["th", "the", "in", "an", "and", "er"]
MERGES = ["t h", "th e", "i n", "a n", "an d", "e r"]
NEW = {
    "ing": [31, 9],
    "ed": [7, 6],
    "ly": [14, 27],
    "de": [6, 7],
    "all": [3, 14, 14],
}  # piece -> base ids
NEW_MERGES = ["in g", "e d", "l y", "d e", "a ll", "l l"]
BASE_PIECES = ["<unk>", "<s>", "</s>", *LETTERS, *MERGED, "<|eot|>"]
BASE_ROWS, CHAT_ROWS, CPT_ROWS = 38, 40, 48
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['content'] }}<|eot|>{% endfor %}"
    "{{ eos_token if false }}"
)

Weights = dict[str, torch.Tensor]


@dataclass
class Family:
    """Where the models are, and what was written there."""

    root: Path
    tied: bool
    weights: dict[str, Weights]
    vocabulary: VocabularyMap

    def __getattr__(self, name: str) -> Path:
        if name in ("base", "chat", "cpt", "tokenizer"):
            return self.root / name
        raise AttributeError(name)


def pieces_of(model: str) -> list[str]:
    """Token strings in the order of their ids; None stands for a padding row."""
    if model == "base":
        return BASE_PIECES
    if model == "chat":
        return [*BASE_PIECES, "pad0", "pad1", "<|im_start|>"]
    return [
        *BASE_PIECES,
        "pad0",
        "pad1",
        *NEW,
        "<|im_start|>",
    ]  # base's two padding rows stay what they are


def write_tokenizer(directory: Path, model: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    ids = {
        token: number
        for number, token in enumerate(pieces_of(model))
        if not token.startswith("pad")
    }
    added = [token for token in ids if token.startswith("<")]
    merges = [*MERGES, *(NEW_MERGES if model == "cpt" else [])]
    merges = [
        merge
        for merge in merges
        if all(part in ids for part in [*merge.split(), merge.replace(" ", "")])
    ]
    content = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "added_tokens": [
            {"id": ids[token], "content": token, "single_word": False, "lstrip": False,
             "rstrip": False,
             "normalized": False, "special": True} for token in added
        ],
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>",
        "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": False,
                  "vocab": ids, "merges": [merge.split() for merge in merges]},
    }  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    if model == "chat":
        config |= {"eos_token": "<|eot|>", "chat_template": TEMPLATE}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_config(directory: Path, rows: int, tied: bool, **more: Any) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": MIDDLE,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": rows, "tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2,
        "rope_theta": 10000.0,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "torch_dtype": "bfloat16", **more,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))


def shapes(rows: int, tied: bool) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (16, HIDDEN),
            "self_attn.v_proj": (16, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (MIDDLE, HIDDEN),
            "mlp.up_proj": (MIDDLE, HIDDEN),
            "mlp.down_proj": (HIDDEN, MIDDLE), "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }.items():  # fmt: skip
            found[prefix + name + ".weight"] = shape
    found["model.norm.weight"] = (HIDDEN,)
    return found if tied else {**found, "lm_head.weight": (rows, HIDDEN)}


def draw(like: Mapping[str, tuple[int, ...]], scale: float, seed: int) -> Weights:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) * scale for name, shape in like.items()}


def bfloat16(weights: Weights) -> Weights:
    return {name: values.bfloat16() for name, values in weights.items()}


def save_weights(weights: Weights, directory: Path, files: int = 1) -> None:
    """One file, or several with an index."""
    if files == 1:
        save_file(weights, directory / "model.safetensors", {"format": "pt"})
        return
    names = sorted(weights)
    weight_map = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = names[number::files]
        save_file({name: weights[name] for name in part}, directory / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def make_family(root: Path, tied: bool = False, files: int = 1) -> Family:
    base = draw(shapes(BASE_ROWS, tied), 0.2, 0)
    chat = draw(shapes(CHAT_ROWS, tied), 0.02, 1)
    cpt = draw(shapes(CPT_ROWS, tied), 0.04, 2)
    for name, values in base.items():
        chat[name][: len(values)] += values
        cpt[name][: len(values)] += values
    models = {"base": bfloat16(base), "chat": bfloat16(chat), "cpt": bfloat16(cpt)}
    for model, weights in models.items():
        write_tokenizer(root / model, model)
        save_weights(weights, root / model, files)
        write_config(root / model, len(weights["model.embed_tokens.weight"]), tied)
    write_tokenizer(root / "tokenizer", "cpt")
    generation = {
        "eos_token_id": [2, 35],
        "pad_token_id": 38,
        "do_sample": True,
        "temperature": 0.6,
    }
    (root / "chat" / "generation_config.json").write_text(json.dumps(generation))
    ids = {token: number for number, token in enumerate(pieces_of("cpt"))}
    vocabulary = VocabularyMap(
        BASE_ROWS, CPT_ROWS,
        [NewPiece(ids[piece], piece, constituents) for piece, constituents in NEW.items()],
        [ChatToken(ids["<|im_start|>"], "<|im_start|>", 38)],
        list(range(len(ids), CPT_ROWS)),
    )  # fmt: skip
    vocabulary.save(root / "tokenizer")
    return Family(root, tied, models, vocabulary)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Family:
    return make_family(tmp_path / "models", tied=request.param)


@pytest.fixture
def untied(tmp_path: Path) -> Family:
    return make_family(tmp_path / "models")


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than a small merge."""
    monkeypatch.setattr(files, "_return_freed_memory", lambda: None)


@pytest.fixture
def recording() -> Recording:
    return Recording()


@pytest.fixture
def tracker(recording: Recording) -> Tracker:
    return Tracker([recording])
