"""Quantised models in every command that reads models: dequantised, or refused before work starts."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.errors import UserError
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.extract import extract
from cpt_merge.merge.files import merge_directories
from cpt_merge.merge.plan import MergeInputs, plan
from cpt_merge.tokenizer_ext import EmbeddingsConfig
from cpt_merge.tokenizer_ext.embeddings.resize import resize_embeddings
from tests.checkpoint.published import edit_weights, save_model, to_block_fp8, to_mxfp4
from tests.merge.test_merge_files import inputs_of, load, merge


@pytest.fixture
def fp8(untied):
    """Base and chat as DeepSeek publishes models; `weights` are their values in float32."""
    for model in ("base", "chat"):
        directory = untied.root / model
        to_block_fp8(directory, (32, 32))
        stored = load_file(directory / "model.safetensors")
        for name, scales in stored.items():
            if name.endswith("_scale_inv"):
                weight = stored[name.removesuffix("_scale_inv")]
                scale = scales.repeat_interleave(32, 0).repeat_interleave(32, 1)
                scaled = weight.float() * scale[: weight.shape[0], : weight.shape[1]]
                untied.weights[model][name.removesuffix("_scale_inv")] = scaled
    return untied


def matrices(family):
    return [name for name in family.weights["base"] if "_proj" in name]


def test_a_merge_dequantises(fp8, tmp_path, tracker):
    merge(fp8, tmp_path / "out", tracker, ratio=0.7)
    merged = load(tmp_path / "out")
    assert set(merged) == set(fp8.weights["base"])
    for name in matrices(fp8):
        cpt, base, chat = (fp8.weights[model][name].float() for model in ("cpt", "base", "chat"))
        assert torch.equal(merged[name], (cpt + (chat - base) * 0.7).bfloat16()), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert not any("quant" in line for line in report["config_differences"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.state_dict()[matrices(fp8)[0]], merged[matrices(fp8)[0]])


def test_a_quantised_cpt_is_written_in_the_type_that_is_asked_for(fp8, tmp_path):
    to_block_fp8(fp8.cpt, (32, 32))
    for dtype, expected in (("float32", torch.float32), (None, torch.bfloat16)):
        out = tmp_path / str(dtype)
        merge_directories(MergeConfig(dtype=dtype), inputs_of(fp8), out)
        assert {values.dtype for values in load(out).values()} == {expected}
        assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_an_extracted_vector_dequantises(fp8, tmp_path, tracker):
    extract(fp8.base, fp8.chat, tmp_path / "vector")
    vector = load_file(tmp_path / "vector" / "vector.safetensors")
    for name in matrices(fp8):
        assert torch.equal(vector[name], fp8.weights["chat"][name] - fp8.weights["base"][name])
    merge(fp8, tmp_path / "pair", tracker)
    inputs = MergeInputs(fp8.cpt, tokenizer=fp8.tokenizer, vector=tmp_path / "vector")
    merge_directories(MergeConfig(), inputs, tmp_path / "out")
    ours, expected = load(tmp_path / "out"), load(tmp_path / "pair")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_quantised_base_is_resized(fp8, tmp_path):
    resize_embeddings(EmbeddingsConfig(), fp8.base, fp8.tokenizer, tmp_path / "out")
    weights = load(tmp_path / "out")
    assert set(weights) == set(fp8.weights["base"])
    for name in matrices(fp8):
        assert torch.equal(weights[name], fp8.weights["base"][name].bfloat16())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(loaded.config, "quantization_config")


def test_only_one_quantised_model_is_named_for_what_it_is(untied, tmp_path):
    edit_weights(
        untied.chat,
        lambda weights: weights.update({"model.norm.g_idx": torch.zeros(3, dtype=torch.int32)}),
    )
    for refuse in (
        lambda: plan(MergeConfig(), inputs_of(untied), tmp_path / "out"),
        lambda: extract(untied.base, untied.chat, tmp_path / "out"),
    ):
        with pytest.raises(UserError) as caught:
            refuse()
        message = str(caught.value)
        assert f"{untied.chat} is quantised with GPTQ" in message
        assert "missing" not in message
        assert "fit together" not in message
    assert not (tmp_path / "out").exists()


def test_mxfp4_models_merge_with_a_plain_one(tmp_path):
    """As gpt-oss: base and chat in MXFP4, CPT in bfloat16."""
    experts = {"num_local_experts": 3, "intermediate_size": 96,
               "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
    base, chat, cpt = (
        save_model(tmp_path / name, "gpt_oss", seed, **experts)
        for seed, name in enumerate(("base", "chat", "cpt"))
    )
    to_mxfp4(base, seed=3)
    to_mxfp4(chat, seed=4)
    merge_directories(MergeConfig(ratio=0.5), MergeInputs(cpt, base, chat), tmp_path / "out")
    models = [Checkpoint.open(directory) for directory in (base, chat, cpt, tmp_path / "out")]
    for name in models[2].tensors:
        of_base, of_chat, of_cpt, merged = (model.read_float32(name) for model in models)
        expected = torch.from_numpy(of_cpt + (of_chat - of_base) * np.float32(0.5)).bfloat16()
        assert torch.equal(torch.from_numpy(merged).bfloat16(), expected), name
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
