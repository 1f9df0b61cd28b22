"""Bytes that must never change: inputs made of integers, outputs known by their digests.

A change of the written order of the arithmetic (`merge/kernel.py`), of the rounding, of what is
drawn, shows here. So does a processor or a library that computes otherwise.
"""

import json

import numpy as np
import pytest

from cpt_merge.checkpoint.writer import CheckpointLayout, CheckpointWriter, TensorSpec
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.extract import extract
from cpt_merge.merge.files import merge_directories
from cpt_merge.merge.plan import MergeInputs
from tests.merge.test_merge_files import digest

SHAPES = {
    "model.embed_tokens.weight": (97, 24), "model.layers.0.self_attn.q_proj.weight": (24, 24),
    "model.layers.0.input_layernorm.weight": (24,), "model.layers.1.mlp.up_proj.weight": (40, 24),
    "model.norm.weight": (24,), "lm_head.weight": (97, 24),
}  # fmt: skip
TYPES = {"base": "BF16", "chat": "F16", "cpt": "F32"}

GOLDEN = {
    "add": ({"ratio": 1.0}, "e785ae538838c82e"),
    "ratio": ({"ratio": 0.7}, "dc401953f6aa29bc"),
    "float32": ({"ratio": 0.7, "dtype": "float32"}, "2d316d8cbf1bb184"),
    "float16": ({"ratio": -0.3, "dtype": "float16"}, "d314a2ab643f2ab7"),
    "ramp": (
        {"ratio": "ramp(0.2, 1)", "rules": [{"kinds": ["norm"], "action": "replace"}]},
        "8cb28b819c25418c",
    ),
    "gate": ({"gate": True}, "b9ced6526d6eab8c"),
    "ties": ({"method": "ties", "density": 0.3}, "45bcba1549ab1b5c"),
    "dare": ({"method": "dare", "density": 0.3, "seed": 5}, "53b20330297dfbe2"),
    "dare_ties": ({"method": "dare_ties", "density": 0.3}, "7c588365bcf7c372"),
}


def bits(seed, size, dtype):
    """Elements of about 0.004 to 1, from a counter-based generator's bits alone."""
    raw = np.random.Philox(key=seed).random_raw(size).astype(np.uint32)
    sign, exponent, mantissa = raw & 0x80000000, (raw >> 8) % 8 + 119, raw & 0x7FFFFF
    values = (sign | exponent << 23 | mantissa).view(np.float32)
    if dtype == "F32":
        return values
    return (
        values.astype(np.float16)
        if dtype == "F16"
        else (values.view(np.uint32) >> 16).astype(np.uint16)
    )


@pytest.fixture
def models(tmp_path):
    for number, (model, dtype) in enumerate(TYPES.items()):
        writer = CheckpointWriter(
            tmp_path / model,
            CheckpointLayout.by_size(
                [TensorSpec(name, dtype, shape) for name, shape in SHAPES.items()]
            ),
        )
        with writer.alone():
            for place, (name, info) in enumerate(writer.layout.tensors.items()):
                writer.write_flat(name, 0, bits(100 * number + place, info.size, dtype))
            config = {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": 97}
            (writer.directory / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(("settings", "expected"), list(GOLDEN.values()), ids=list(GOLDEN))
def test_the_bytes_are_these(models, tracker, settings, expected):
    inputs = MergeInputs(models / "cpt", models / "base", models / "chat", models / "cpt")
    merge_directories(MergeConfig(**settings), inputs, models / "out", tracker)
    assert digest(models / "out")[:16] == expected


def test_the_bytes_of_an_extracted_vector_are_these(models):
    extract(models / "base", models / "chat", models / "vector")
    assert digest(models / "vector")[:16] == "51baf907b9c75a41"
