"""LoRA adapters as CPT and as chat model of a merge."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import cpt_merge
from cpt_merge.core.errors import UserError
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.ancestry import pair_warnings
from cpt_merge.merge.extract import extract
from cpt_merge.merge.files import merge_directories
from cpt_merge.merge.fit import open_fitting
from cpt_merge.merge.plan import MergeInputs
from cpt_merge.tokenizer_ext import EmbeddingsConfig
from cpt_merge.tokenizer_ext.embeddings.resize import resize_embeddings
from tests.merge.test_merge_files import inputs_of, load

QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def to_adapter(family, model, modules, tokenizer):
    """Replace a model by an adapter of the base: two matrices, and its own vocabulary.

    Returns what its changed matrices are then, in float32.
    """
    directory = family.root / model
    random = torch.Generator().manual_seed(len(model))
    whole, tensors, changed = family.weights[model], {}, {}
    for module in modules:
        weight = family.weights["base"][f"{module}.weight"].float()
        a = torch.randn(4, weight.shape[1], generator=random) * 0.1
        b = torch.randn(weight.shape[0], 4, generator=random) * 0.1
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        changed[f"{module}.weight"] = weight + 2 * (b @ a)
    if tokenizer:
        tensors |= {name: whole[name] for name in VOCABULARY}
    for path in directory.iterdir():
        if not tokenizer or "token" not in path.name:
            path.unlink()
    save_file({f"base_model.model.{name}": values for name, values in tensors.items()},
              directory / "adapter_model.safetensors")  # fmt: skip
    (directory / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4,
                    "lora_alpha": 8, "modules_to_save": ["embed_tokens", "lm_head"]})
    )  # fmt: skip
    return changed


def test_adapters_as_cpt_and_as_chat(untied, tmp_path):
    """Both have their vocabulary in the adapter; its rows are those of a merge of whole models."""
    merge_directories(MergeConfig(ratio=0.5), inputs_of(untied), tmp_path / "whole")
    whole = load(tmp_path / "whole")
    cpt = to_adapter(untied, "cpt", [QUERY], tokenizer=True)
    chat = to_adapter(untied, "chat", [DOWN], tokenizer=True)
    shutil.copy(untied.tokenizer / "vocabulary_map.json", untied.cpt)
    inputs = MergeInputs(untied.cpt, untied.base, untied.chat)
    merge_directories(MergeConfig(ratio=0.5), inputs, tmp_path / "out")
    merged, base = load(tmp_path / "out"), untied.weights["base"]
    for name, values in merged.items():
        if name in VOCABULARY:
            assert torch.equal(values, whole[name])
            continue
        expected = cpt.get(name, base[name].float())
        if name in chat:
            expected = expected + (chat[name] - base[name].float()) * 0.5
        torch.testing.assert_close(values, expected.bfloat16(), rtol=2**-7, atol=1e-3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == len(merged[VOCABULARY[0]])
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    in_memory, _ = cpt_merge.merge_in_memory(untied.cpt, untied.base, untied.chat, ratio=0.5)
    for name, values in in_memory.state_dict().items():
        torch.testing.assert_close(values.bfloat16(), merged[name], rtol=0, atol=0)


def test_the_vector_of_an_adapter(untied, tmp_path):
    chat = to_adapter(untied, "chat", [DOWN], tokenizer=False)
    extract(untied.base, untied.chat, tmp_path / "vector")
    vector = load_file(tmp_path / "vector" / "vector.safetensors")
    expected = chat[f"{DOWN}.weight"] - untied.weights["base"][f"{DOWN}.weight"].float()
    torch.testing.assert_close(vector[f"{DOWN}.weight"], expected, rtol=1e-5, atol=1e-6)
    assert vector[f"{QUERY}.weight"].abs().max() == 0
    assert (tmp_path / "vector" / "tokenizer.json").is_file()
    assert open_fitting({"base": untied.base, "chat": untied.chat})
    assert not pair_warnings(untied.base, untied.chat)


def test_an_adapter_is_no_base(untied, tmp_path):
    shutil.copytree(untied.base, tmp_path / "org" / "base")
    to_adapter(untied, "base", [QUERY], tokenizer=True)
    config = untied.base / "adapter_config.json"
    named = {
        **json.loads(config.read_text()),
        "base_model_name_or_path": str(tmp_path / "org/base"),
    }
    config.write_text(json.dumps(named))
    with pytest.raises(UserError, match="a base must be a whole model"):
        resize_embeddings(EmbeddingsConfig(), untied.base, untied.tokenizer, tmp_path / "out")


def test_without_tokenizer_the_message_names_the_option(untied, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (untied.cpt / name).unlink()
    inputs = MergeInputs(untied.cpt, untied.base, untied.chat)
    with pytest.raises(UserError, match="--tokenizer"):
        merge_directories(MergeConfig(), inputs, tmp_path / "out")
