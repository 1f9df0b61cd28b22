"""Quantised weights are read as transformers dequantises them, or refused by the method's name."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cpt_merge.checkpoint.dtypes import widen
from cpt_merge.checkpoint.quantised import FLOAT8, refuse_by_config
from cpt_merge.checkpoint.reader import Checkpoint, check_complete
from cpt_merge.core.errors import UserError
from cpt_merge.evaluation.models import shared_context
from tests.checkpoint.published import edit_config, edit_weights, save_model, to_block_fp8, to_mxfp4


def check_against_transformers(directory):
    """Every tensor equals what transformers loads, whole and in parts.

    On a CPU, transformers dequantises to bfloat16.
    """
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).state_dict()
    checkpoint = Checkpoint.open(directory)
    tied = {"lm_head.weight"} if checkpoint.config["tie_word_embeddings"] else set()
    assert set(checkpoint.tensors) == set(loaded) - tied
    for name, info in checkpoint.tensors.items():
        found = checkpoint.read_float32(name)
        assert found.shape == loaded[name].shape
        assert torch.equal(torch.from_numpy(found).bfloat16(), loaded[name]), name
        flat, size = found.reshape(-1), info.size
        for start, stop in ((size - 2, size - 1), (size // 3, size // 2), (size // 5 + 1, size)):
            part = widen(checkpoint.read_flat(name, start, stop), info.dtype)
            assert np.array_equal(part, flat[start:stop])
    return checkpoint


def as_float32(checkpoint):
    return {name: checkpoint.read_float32(name) for name in checkpoint.tensors}


@pytest.mark.parametrize(
    ("name", "dtype"), [("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)]
)
def test_every_8_bit_float_has_its_value(name, dtype):
    expected = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    assert np.array_equal(FLOAT8[name], expected, equal_nan=True)


def test_block_fp8_is_read_as_transformers_reads_it(tmp_path):
    directory = save_model(tmp_path / "model", "qwen3")
    to_block_fp8(directory, (32, 16))
    edit_config(directory, tie_word_embeddings=False)
    edit_weights(
        directory, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()})
    )
    checkpoint = check_against_transformers(directory)
    assert "quantization_config" not in checkpoint.config
    info = checkpoint.info("model.layers.0.mlp.down_proj.weight")
    assert (info.dtype, info.copied_dtype) == ("F32", "BF16")


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "qwen3_moe": {"num_experts": 4, **EXPERTS},
    "deepseek_v3": {
        "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4, **EXPERTS,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_same_model_from_plain_weights(tmp_path, family):
    """Transformers joins the experts, so its names are not the checkpoint's."""
    quantised = save_model(
        tmp_path / "model", family, tie_word_embeddings=False, **FAMILIES[family]
    )
    to_block_fp8(quantised, (16, 16))
    checkpoint, plain = Checkpoint.open(quantised), tmp_path / "plain"
    plain.mkdir()
    found = {name: torch.from_numpy(values) for name, values in as_float32(checkpoint).items()}
    save_file({name: values.bfloat16() for name, values in found.items()},
              plain / "model.safetensors", {"format": "pt"})  # fmt: skip
    (plain / "config.json").write_text(json.dumps(checkpoint.config))
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).state_dict()
        for directory in (plain, quantised)
    )
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name].float(), theirs[name].float()) for name in ours)


def test_blocks_that_do_not_fill_a_matrix(tmp_path):
    """As kv_a_proj_with_mqa of DeepSeek, 576 rows in blocks of 128; transformers refuses these."""
    directory = save_model(tmp_path / "model", "llama", hidden_size=80, intermediate_size=200)
    to_block_fp8(directory, (48, 48))
    checkpoint = Checkpoint.open(directory)
    for name, values in load_file(directory / "model.safetensors").items():
        if name.endswith("_scale_inv"):
            weight = load_file(directory / "model.safetensors")[name.removesuffix("_scale_inv")]
            scale = values.repeat_interleave(48, 0).repeat_interleave(48, 1)
            expected = weight.float() * scale[: weight.shape[0], : weight.shape[1]]
            found = checkpoint.read_float32(name.removesuffix("_scale_inv"))
            assert np.array_equal(found, expected.numpy())


def per_tensor(weights, name, values):
    scale = values.float().abs().max() / 448
    weights[name] = (values.float() / scale).to(torch.float8_e4m3fn)
    weights[f"{name}_scale"] = scale.reshape(1).bfloat16()
    weights[f"{name.removesuffix('weight')}input_scale"] = torch.ones(1)


def per_row(weights, name, values):
    scale = values.float().abs().amax(1, keepdim=True) / 448
    weights[name] = (values.float() / scale).to(torch.float8_e4m3fn)
    weights[f"{name}_scale"] = scale


def powers_of_two(weights, name, values):
    weights[name] = (values.float() * 512).to(torch.float8_e4m3fn)
    weights[f"{name}_scale_inv"] = torch.full((1, 1), 2.0**-9).to(torch.float8_e8m0fnu)


@pytest.mark.parametrize("quantise", [per_tensor, per_row, powers_of_two])
def test_other_scales_of_fp8(tmp_path, quantise, capsys):
    """compressed-tensors, FBGEMM and ModelOpt: a scale for each row, or one for all."""
    directory = save_model(tmp_path / "model", "llama")

    def change(weights):
        for name in [name for name in weights if "_proj" in name]:
            quantise(weights, name, weights[name])

    edit_weights(directory, change)
    edit_config(directory, quantization_config={"quant_method": "compressed-tensors"})
    stored, found = (
        load_file(directory / "model.safetensors"),
        as_float32(Checkpoint.open(directory)),
    )
    assert not any("scale" in name for name in found)
    for name in found:
        scale = stored.get(f"{name}_scale", stored.get(f"{name}_scale_inv", torch.ones(1)))
        assert np.array_equal(found[name], (stored[name].float() * scale.float()).numpy()), name
    assert ("scales of activations" in capsys.readouterr().err) == (quantise is per_tensor)


def test_mxfp4_is_read_as_transformers_reads_it(tmp_path):
    directory = save_model(
        tmp_path / "model", "gpt_oss", num_local_experts=3, intermediate_size=96,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    to_mxfp4(directory)
    checkpoint = check_against_transformers(directory)
    assert checkpoint.info("model.layers.0.mlp.experts.gate_up_proj").shape == (3, 64, 192)
    before = as_float32(checkpoint)
    edit_weights(directory, exponents_as_floats)
    edit_config(directory, quantization_config=None)
    again = as_float32(Checkpoint.open(directory))
    assert all(np.array_equal(before[name], again[name]) for name in before)


def exponents_as_floats(weights):
    for name in weights:
        if name.endswith("_scales"):
            weights[name] = weights[name].view(torch.float8_e8m0fnu)


def gptq(weights, name, values):
    stem = name.removesuffix("weight")
    del weights[name]
    weights[f"{stem}qweight"] = torch.zeros(8, values.shape[0], dtype=torch.int32)
    weights[f"{stem}qzeros"] = torch.zeros(1, 8, dtype=torch.int32)
    weights[f"{stem}scales"] = torch.ones(1, values.shape[0]).half()
    weights[f"{stem}g_idx"] = torch.zeros(values.shape[1], dtype=torch.int32)


def awq(weights, name, values):
    gptq(weights, name, values)
    del weights[f"{name.removesuffix('weight')}g_idx"]


def four_bits(weights, name, values):
    weights[name] = torch.zeros(values.numel() // 2, 1, dtype=torch.uint8)
    weights[f"{name}.absmax"] = torch.zeros(4, dtype=torch.uint8)
    weights[f"{name}.nested_absmax"] = torch.ones(1)
    weights[f"{name}.quant_map"] = torch.ones(16)
    weights[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(20, dtype=torch.uint8)


def eight_bits(weights, name, values):
    weights[name] = torch.zeros(values.shape, dtype=torch.int8)
    weights[f"{name.removesuffix('weight')}SCB"] = torch.ones(values.shape[0])


def hqq(weights, name, values):
    del weights[name]
    weights[f"{name.removesuffix('weight')}W_q"] = torch.zeros(8, 8, dtype=torch.uint8)


def packed(weights, name, values):
    del weights[name]
    weights[f"{name}_packed"] = torch.zeros(8, 8, dtype=torch.int32)
    weights[f"{name}_scale"] = torch.ones(8, 1)
    weights[f"{name}_shape"] = torch.tensor(values.shape)


def integers(weights, name, values):
    weights[name] = torch.zeros(values.shape, dtype=torch.int8)
    weights[f"{name}_scale"] = torch.ones(values.shape[0], 1)


def nvfp4(weights, name, values):
    weights[name] = torch.zeros(values.shape[0], values.shape[1] // 2, dtype=torch.uint8)
    weights[f"{name}_scale"] = torch.ones(values.shape[0], 4).to(torch.float8_e4m3fn)
    weights[f"{name}_scale_2"] = torch.tensor(1.0)


def without_scales(weights, name, values):
    weights[name] = values.to(torch.float8_e4m3fn)


def scales_alone(weights, name, values):
    weights[f"{name}_scale_inv"] = torch.ones(1, 1)


def wrong_scales(weights, name, values):
    weights[name] = values.to(torch.float8_e4m3fn)
    weights[f"{name}_scale_inv"] = torch.ones(7, 3)


BITSANDBYTES = ("bitsandbytes", "dequantize()")
METHODS = [
    (gptq, {"quant_method": "gptq"}, ("GPTQ", "GPTQModel")),
    (gptq, None, ("GPTQ", "g_idx")),
    (awq, {"quant_method": "awq"}, ("AWQ",)),
    (awq, None, ("AWQ", "qweight")),
    (awq, {"quant_method": "intel/auto-round"}, ("AutoRound",)),
    (four_bits, {"load_in_4bit": True}, BITSANDBYTES),
    (four_bits, None, BITSANDBYTES),
    (eight_bits, {"quant_method": "bitsandbytes", "load_in_8bit": True}, BITSANDBYTES),
    (eight_bits, None, BITSANDBYTES),
    (hqq, {"quant_method": "hqq"}, ("HQQ",)),
    (hqq, None, ("HQQ",)),
    (packed, {"quant_method": "compressed-tensors"}, ("compressed-tensors", "run_compressed")),
    (packed, None, ("compressed-tensors",)),
    (integers, {"quant_method": "compressed-tensors"}, ("compressed-tensors", "I8")),
    (integers, {"quant_method": "new"}, ("'new'", "I8", "16-bit")),
    (integers, {"quant_method": "quark"}, ("Quark", "AMD")),
    (integers, None, ("I8", "16-bit")),
    (nvfp4, None, ("NVFP4",)),
    (without_scales, {"quant_method": "fp8"}, ("F8_E4M3", "without the scales")),
    (without_scales, None, ("F8_E4M3", "without the scales")),
    (scales_alone, None, ("scale_inv", "in part")),
    (wrong_scales, None, ("(7, 3)", "does not scale")),
]


@pytest.mark.parametrize(("quantise", "config", "words"), METHODS)
def test_other_methods_are_refused_by_name(tmp_path, quantise, config, words):
    directory = save_model(tmp_path / "model", "llama", num_hidden_layers=1)

    def change(weights):
        for name in [name for name in weights if "_proj" in name]:
            quantise(weights, name, weights[name])

    edit_weights(directory, change)
    if config:
        edit_config(directory, quantization_config=config)
    with pytest.raises(UserError) as caught:
        Checkpoint.open(directory)
    message = str(caught.value)
    assert all(word in message for word in (str(directory), *words)), message
    assert "\n" not in message


@pytest.mark.parametrize("method", ["bitnet", "torchao"])
def test_methods_whose_plain_weights_are_not_the_models(tmp_path, method):
    directory = save_model(tmp_path / "model", "llama", num_hidden_layers=1)
    edit_config(directory, quantization_config={"quant_method": method})
    with pytest.raises(UserError, match="(?i)" + method):
        Checkpoint.open(directory)


def test_a_configuration_that_outlived_quantisation_is_ignored(tmp_path, capsys):
    directory = save_model(tmp_path / "model", "llama", num_hidden_layers=1)
    before = as_float32(Checkpoint.open(directory))
    edit_config(
        directory,
        text_config={"quantization_config": {"quant_method": "bitsandbytes"}, "hidden_size": 64},
    )
    checkpoint = Checkpoint.open(directory)
    assert all(
        np.array_equal(before[name], values) for name, values in as_float32(checkpoint).items()
    )
    assert checkpoint.config["text_config"] == {"hidden_size": 64}
    assert "bitsandbytes" in capsys.readouterr().err
    assert (
        "quantization_config" in json.loads((directory / "config.json").read_text())["text_config"]
    )


@pytest.mark.parametrize("quantise", [four_bits, powers_of_two])
def test_transformers_is_not_asked_for_quantised_weights_that_it_would_not_scale(
    tmp_path, quantise
):
    """Without quantization_config it takes the stored numbers for the weights."""
    directory = save_model(tmp_path / "model", "llama", num_hidden_layers=1)
    check_complete(directory)

    def change(weights):
        for name in [name for name in weights if "_proj" in name]:
            quantise(weights, name, weights[name])

    edit_weights(directory, change)
    with pytest.raises(UserError, match=r"bitsandbytes|restore quantization_config"):
        check_complete(directory)
    edit_config(directory, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match="model one: it is quantised, and transformers cannot"):
        shared_context({"one": directory}, 64)


def test_of_a_model_on_the_hub_only_config_json_is_known():
    fp8 = {"quantization_config": {"quant_method": "compressed-tensors"}}
    for config in ({}, fp8, {"quantization_config": {"quant_method": "mxfp4"}}):
        refuse_by_config("org/model", config)
    with pytest.raises(UserError, match="org/model is quantised with AWQ; use the 16-bit"):
        refuse_by_config(
            "org/model", {"text_config": {"quantization_config": {"quant_method": "awq"}}}
        )
