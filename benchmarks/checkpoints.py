"""Random checkpoints with the shapes of a Llama, for benchmarks.

There are a base, a chat model, and CPT models with two vocabularies.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpt_merge.checkpoint.dtypes import Float32, narrow, widen
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.writer import CheckpointLayout, CheckpointWriter, TensorSpec

SHARD_BYTES = 500_000_000
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Shape:
    """Those of TinyLlama 1.1 B by default."""

    layers: int = 22
    hidden: int = 2048
    intermediate: int = 5632
    key_value: int = 256

    def tensors(self, rows: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape, for a vocabulary of `rows` rows."""
        hidden, intermediate = self.hidden, self.intermediate
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, hidden)}
        of_layer = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (self.key_value, hidden),
            "self_attn.v_proj": (self.key_value, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (intermediate, hidden), "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate), "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        for layer in range(self.layers):
            found |= {
                f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()
            }
        return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (rows, hidden)}


TINYLLAMA = Shape()
LLAMA2_7B = Shape(layers=32, hidden=4096, intermediate=11008, key_value=4096)


def prepare(directory: Path, shape: Shape = TINYLLAMA, extended: bool = True) -> None:
    """Write base, chat, cpt (32,000 rows) and, if `extended`, cpt48k (48,000), where missing."""
    base, chat, cpt = (directory / name for name in ("base", "chat", "cpt"))
    _model(base, shape, 32_000, None, 0.02, 0)
    _model(chat, shape, 32_000, base, 0.002, 1)
    _model(cpt, shape, 32_000, base, 0.004, 2)
    if extended:
        _model(directory / "cpt48k", shape, 48_000, base, 0.004, 3)


def _model(
    out: Path, shape: Shape, rows: int, ancestor: Path | None, scale: float, seed: int
) -> None:
    if out.exists():
        return
    specs = [TensorSpec(name, "BF16", size) for name, size in shape.tensors(rows).items()]
    writer = CheckpointWriter(out, CheckpointLayout.by_size(specs, SHARD_BYTES))
    source = Checkpoint.open(ancestor) if ancestor else None
    random = np.random.default_rng(seed)
    with writer.alone():
        for name, info in writer.layout.tensors.items():
            for start in range(0, info.size, _BLOCK):
                stop = min(start + _BLOCK, info.size)
                values: Float32 = random.standard_normal(stop - start, np.float32)
                values *= np.float32(scale)
                if source is not None and start < (size := source.info(name).size):
                    known = widen(source.read_flat(name, start, min(stop, size)), "BF16")
                    values[: len(known)] += known
                writer.write_flat(name, start, narrow(values, "BF16"))
        _write_json(writer.directory / "config.json", _config(shape, rows))
        _write_json(writer.directory / "tokenizer.json", word_tokenizer(rows))
        roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        _write_json(writer.directory / "tokenizer_config.json", roles)


def _config(shape: Shape, rows: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": rows,
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers, "num_attention_heads": 32,
        "num_key_value_heads": 32 * shape.key_value // shape.hidden,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }  # fmt: skip


def word_tokenizer(rows: int) -> dict[str, object]:
    """A tokenizer.json of `rows` invented words; ids 0 .. 2 are unknown, begin and end."""
    plain = {"special": True} | dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False
    )
    special = [
        {"id": number, "content": token, **plain}
        for number, token in enumerate(["<unk>", "<s>", "</s>"])
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"t{number}" for number in range(3, rows))]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>",
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                  "byte_fallback": False, "ignore_merges": True,
                  "vocab": {token: number for number, token in enumerate(tokens)}, "merges": []},
    }  # fmt: skip


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
