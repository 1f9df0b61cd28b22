"""Random models, their tokenizers and token stores, for the benchmarks of training."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.checkpoints import word_tokenizer
from cpt_merge.core.artifact import write_json
from cpt_merge.data.store import (
    STORE_FILE,
    SourceInfo,
    SplitCounts,
    SplitWriter,
    StoreInfo,
    TokenizerInfo,
)
from cpt_merge.data.store import tokenizer_fingerprint as fingerprint_of

BOS, EOS = 1, 2
MEDIAN_DOCUMENT = 300  # tokens


@dataclass(frozen=True)
class Size:
    """The shapes of a Llama, or with experts (of `intermediate` each) of a Qwen3-MoE."""

    rows: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    positions: int = 8192
    experts: int = 0
    taken: int = 0  # of them by a token


SIZES = {
    "small": Size(8_192, 256, 688, 6, 4, 2),
    "experts": Size(8_192, 256, 176, 6, 4, 2, experts=16, taken=4),  # active: about those of small
    "135m": Size(49_152, 576, 1_536, 30, 9, 3),  # SmolLM2 135M, its matrices not tied
    "long-vocabulary": Size(128_256, 256, 688, 2, 4, 2),
    "1b": Size(128_256, 2048, 8192, 16, 32, 8),  # Llama 3.2 1B, its matrices not tied
    "3b": Size(128_256, 3072, 8192, 28, 24, 8),  # Llama 3.2 3B, not tied
    "8b": Size(128_256, 4096, 14336, 32, 32, 8),  # Llama 3.1 8B
}


@dataclass(frozen=True)
class Inputs:
    """A model with its tokenizer, and a store, in one folder."""

    model: Path
    store: Path

    @staticmethod
    def of(folder: Path, name: str) -> Inputs:
        """Where the inputs of a size are."""
        return Inputs(folder / name / "model", folder / name / "store")


def prepare(folder: Path, name: str, tokens: int, document: int = MEDIAN_DOCUMENT) -> None:
    """Make the inputs of a size unless they exist.

    `document` is the median length of documents in tokens. Lengths are log-normal, as those of web
    pages and articles.
    """
    inputs, size = Inputs.of(folder, name), SIZES[name]
    if not (inputs.model / "config.json").is_file():
        make_model(inputs.model, size)
    if not (inputs.store / STORE_FILE).is_file():
        _make_store(inputs, size, tokens, document)


def make_model(directory: Path, size: Size) -> None:
    """A random Llama with a tokenizer of made-up words."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(word_tokenizer(size.rows)))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({**names, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    shapes = {
        "vocab_size": size.rows, "hidden_size": size.hidden, "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_value_heads,
        "max_position_embeddings": size.positions, "bos_token_id": BOS, "eos_token_id": EOS,
    }  # fmt: skip
    experts = {
        "num_experts": size.experts, "num_experts_per_tok": size.taken,
        "moe_intermediate_size": size.intermediate, "head_dim": size.hidden // size.heads,
        "router_aux_loss_coef": 0.0,  # the other contenders do not add it
        "tie_word_embeddings": False,
    }  # fmt: skip
    config = Qwen3MoeConfig(**shapes, **experts) if size.experts else LlamaConfig(**shapes)
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    with torch.device("cuda" if cuda else "cpu"):
        model = AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16 if cuda else torch.float32).save_pretrained(directory)


def _make_store(inputs: Inputs, size: Size, tokens: int, document: int) -> None:
    """Documents of random tokens, which cost a step as much time and memory as real ones."""
    random = np.random.default_rng(0)
    dtype = "uint16" if size.rows <= 2**16 else "uint32"
    counts = {
        split: _write_split(
            inputs.store / "00-random" / split, dtype, size.rows, share, document, random
        )
        for split, share in (("train", tokens), ("heldout", 20_000))
    }
    source = SourceInfo("random", "en", "00-random", {}, counts["train"], counts["heldout"], None)
    tokenizer = TokenizerInfo(fingerprint_of(inputs.model), size.rows, dtype)
    write_json(inputs.store / STORE_FILE, asdict(StoreInfo("benchmark", tokenizer, None, [source])))


def _write_split(
    folder: Path, dtype: str, rows: int, tokens: int, document: int, random: np.random.Generator
) -> SplitCounts:
    writer = SplitWriter(folder, dtype)
    count = max(1, tokens // document)
    lengths = np.maximum(8, random.lognormal(np.log(document), 1.0, count).astype(np.int64))
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), tokens) + 1]
    for length in lengths:
        ids = random.integers(3, rows, length).astype(dtype)
        ids[0], ids[-1] = BOS, EOS
        writer.add(ids, np.asarray([length]), np.asarray([4 * length]))
    return writer.close()
