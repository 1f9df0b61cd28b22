"""Models that transformers itself builds and saves.

Every family merges by name, loads, and computes what it should.
"""

import json

import pytest
import torch

from cpt_merge.core.errors import UserError
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.files import merge_directories
from cpt_merge.merge.plan import MergeInputs
from tests.merge.conftest import pieces_of, save_weights, write_tokenizer
from tests.merge.test_merge_files import load

SMALL = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {"sliding_window": 32}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),  # biases
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),  # norms of queries and keys
    "gemma": ("GemmaConfig", {}),  # tied
    "gemma2": ("Gemma2Config", {}),  # norms before and after
    "gemma3": ("Gemma3TextConfig", {}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 2}),  # experts
}


def build(directory, family, seed, ancestor=None, dtype=torch.float32):
    import transformers

    name, more = FAMILIES[family]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, name)(**{**SMALL, **more})
    )
    state = model.state_dict()
    if ancestor is not None:
        for key, values in ancestor.items():
            state[key].copy_(values.float() + 0.01 * torch.randn_like(state[key]))
    model.to(dtype).save_pretrained(directory)
    return {key: values.clone() for key, values in model.state_dict().items()}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_family_merges_and_loads(family, tmp_path, tracker, capfd):
    from transformers import AutoModelForCausalLM

    base = build(tmp_path / "base", family, 0, dtype=torch.bfloat16)
    chat = build(tmp_path / "chat", family, 1, base, torch.float16)  # types as they come, mixed
    cpt = build(tmp_path / "cpt", family, 2, base)
    for model in ("base", "chat", "cpt"):
        write_tokenizer(tmp_path / model, "base" if model != "chat" else "chat")
    inputs = MergeInputs(tmp_path / "cpt", tmp_path / "base", tmp_path / "chat", tmp_path / "cpt")
    merge_directories(
        MergeConfig(ratio=0.7, shard_size=20e3 / 1e9), inputs, tmp_path / "out", tracker
    )

    model, loading = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    rows = [
        row for row, token in enumerate(pieces_of("base")) if token != "<|eot|>"
    ]  # that one is of the chat format
    for name, values in model.state_dict().items():
        expected = (cpt[name].float() + (chat[name].float() - base[name].float()) * 0.7).bfloat16()
        own = slice(None) if "embed" not in name and "head" not in name else rows
        assert torch.equal(values[own], expected[own]), name
    assert (
        model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=3, do_sample=False).shape[1] >= 4
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(load(tmp_path / "out"))


def test_families_do_not_mix(tmp_path, tracker):
    build(tmp_path / "base", "llama", 0)
    build(tmp_path / "chat", "qwen3", 0)
    inputs = MergeInputs(tmp_path / "base", tmp_path / "base", tmp_path / "chat", tmp_path / "base")
    with pytest.raises(UserError, match="architectures llama in cpt, llama in base, qwen3 in chat"):
        merge_directories(MergeConfig(), inputs, tmp_path / "out", tracker)


def test_rotary_tables_of_old_conversions_are_left_out_and_said(untied, tmp_path, tracker, capsys):
    from safetensors.torch import save_file

    tables = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.arange(4.0)
        for layer in range(2)
    }
    save_file({**untied.weights["base"], **tables}, untied.base / "model.safetensors")
    merge_directories(
        MergeConfig(),
        MergeInputs(untied.cpt, untied.base, untied.chat, untied.tokenizer),
        tmp_path / "out",
        tracker,
    )
    assert (
        "left out 2 tensors (model.layers.0.self_attn.rotary_emb.inv_freq"
        in capsys.readouterr().err
    )
    assert not any("inv_freq" in name for name in load(tmp_path / "out"))


def test_experts_in_two_layouts_are_one_sentence(tmp_path, tracker):
    for model in ("base", "chat", "cpt"):
        build(tmp_path / model, "mixtral", 0)
        write_tokenizer(tmp_path / model, "base")
    stored = load(tmp_path / "cpt")
    experts = [name for name in stored if ".experts." in name]
    one_by_one = any(".experts.0." in name for name in experts)
    for name in experts:
        values = stored.pop(name)
        if one_by_one and ".experts.0." in name:
            stored[name.replace(".experts.0.", ".experts.")] = torch.stack([values, values])
        elif not one_by_one:
            stored |= {name.replace(".experts.", f".experts.{n}."): v for n, v in enumerate(values)}
    save_weights(stored, tmp_path / "cpt")
    inputs = MergeInputs(tmp_path / "cpt", tmp_path / "base", tmp_path / "chat", tmp_path / "cpt")
    with pytest.raises(
        UserError, match=r"the experts are stored (together|one by one) in cpt"
    ) as error:
        merge_directories(MergeConfig(), inputs, tmp_path / "out", tracker)
    assert "is missing" not in str(error.value)
