"""A LoRA adapter is read as the model that PEFT makes of it and its base, or refused by its kind."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cpt_merge.checkpoint.loaded import open_model
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.errors import UserError
from tests.checkpoint.published import ROWS, save_model, to_block_fp8

RANK, ALPHA = 4, 12
PREFIX = "base_model.model."
QUERY = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "base"
    return save_model(directory, "llama", tie_word_embeddings=False)


def matrices(weight, rank=RANK, seed=1):
    """A and B for a weight of shape (out, in)."""
    random = torch.Generator().manual_seed(seed)
    out, width = weight.shape
    return torch.randn(rank, width, generator=random), torch.randn(out, rank, generator=random)


def save_adapter(directory, base, tensors, **config):
    directory.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()},
              directory / "adapter_model.safetensors")  # fmt: skip
    settings = {
        "peft_type": "LORA", "base_model_name_or_path": str(base), "r": RANK, "lora_alpha": ALPHA,
        "use_rslora": False, "fan_in_fan_out": False, "bias": "none", "use_dora": False,
        "alpha_pattern": {}, "rank_pattern": {}, "init_lora_weights": True, **config,
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def simple(base, modules=(QUERY, DOWN), rank=RANK):
    """The tensors of an adapter for some modules, as PEFT names them."""
    weights, found = load_file(base / "model.safetensors"), {}
    for seed, module in enumerate(modules):
        a, b = matrices(weights[f"{module}.weight"], rank, seed)
        found |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    return found


def check(adapter, expected, base, at_hand=None):
    """The adapter's tensors are `expected`, the others the base's; whole and in parts."""
    checkpoint = Checkpoint.open(adapter, base=at_hand)
    stored = load_file(base / "model.safetensors")
    assert set(checkpoint.tensors) == set(stored) | set(expected)
    for name, info in checkpoint.tensors.items():
        found, wanted = checkpoint.read_float32(name), expected.get(name, stored.get(name)).float()
        if name in expected:
            np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-4)
            assert info.copied_dtype == "BF16"
        else:
            assert np.array_equal(found, wanted.numpy())
        for start, stop in ((0, 1), (info.size // 3, info.size // 2), (info.size // 7, info.size)):
            part = checkpoint.read_copied(name, start, stop)
            whole = checkpoint.read_copied(name, 0, info.size)
            assert np.array_equal(part, whole[start:stop]), "values depend on the parts"
    return checkpoint


def added(base, tensors, scaling, modules=(QUERY, DOWN)):
    weights = load_file(base / "model.safetensors")
    return {
        f"{module}.weight": weights[f"{module}.weight"].float()
        + scaling
        * (tensors[f"{PREFIX}{module}.lora_B.weight"] @ tensors[f"{PREFIX}{module}.lora_A.weight"])
        for module in modules
    }


def test_matrices_are_added_with_their_scaling(tmp_path, base):
    tensors = simple(base)
    adapter = save_adapter(tmp_path / "adapter", base, tensors)
    check(adapter, added(base, tensors, ALPHA / RANK), base)
    assert Checkpoint.open(adapter).config == Checkpoint.open(base).config


def test_rank_stabilised_scaling_and_patterns(tmp_path, base):
    tensors = simple(base, [QUERY]) | simple(base, [DOWN], rank=2)
    adapter = save_adapter(
        tmp_path / "adapter", base, tensors, use_rslora=True,
        alpha_pattern={"layers.1.mlp.down_proj": 6}, rank_pattern={r"layers\.\d+\.mlp\.\w+": 2},
    )  # fmt: skip
    expected = added(base, tensors, ALPHA / math.sqrt(RANK), [QUERY])
    check(adapter, expected | added(base, tensors, 6 / math.sqrt(2), [DOWN]), base)


def test_trained_modules_embeddings_and_biases(tmp_path):
    """As Chinese-LLaMA-Alpaca: embedding and head with more rows, trained themselves."""
    base = save_model(tmp_path / "base", "qwen2", tie_word_embeddings=False)
    tensors, bias = simple(base), f"{QUERY}.bias"
    more = {
        "model.embed_tokens.weight": torch.randn(ROWS + 16, 64).bfloat16(),
        "lm_head.weight": torch.randn(ROWS + 16, 64).bfloat16(),
        bias: torch.randn(64).bfloat16(),
    }
    stored = {
        f"{PREFIX}model.embed_tokens.modules_to_save.weight": more["model.embed_tokens.weight"],
        f"{PREFIX}lm_head.weight": more["lm_head.weight"],
        f"{PREFIX}{QUERY}.base_layer.bias": more[bias],
    }
    adapter = save_adapter(tmp_path / "adapter", base, tensors | stored, bias="all")
    checkpoint = Checkpoint.open(adapter)
    for name, values in more.items():
        assert np.array_equal(checkpoint.read_float32(name), values.float().numpy())
    assert checkpoint.config["vocab_size"] == ROWS + 16
    query = added(base, tensors, ALPHA / RANK)[f"{QUERY}.weight"].numpy()
    np.testing.assert_allclose(checkpoint.read_float32(f"{QUERY}.weight"), query, 1e-5, 1e-4)


def test_a_head_of_its_own_unties_a_tied_base(tmp_path):
    base = save_model(tmp_path / "base", "llama", tie_word_embeddings=True)
    head = torch.randn(ROWS, 64).bfloat16()
    adapter = save_adapter(tmp_path / "adapter", base, {f"{PREFIX}lm_head.weight": head})
    found = open_model(adapter).read_float32("lm_head.weight")
    assert np.array_equal(found, head.float().numpy())


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    "trained_as",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=["copy", "low-rank"],
)
def test_a_trained_embedding_of_a_tied_base_leaves_the_head(tmp_path, together, trained_as):
    """PEFT's own logits are those of the model that is read here."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = save_model(tmp_path / "base", "llama", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(r=RANK, ensure_weight_tying=together, **trained_as)
    trained = get_peft_model(model, settings)
    for values in trained.parameters():
        if values.requires_grad:
            values.data += 0.05
    trained.save_pretrained(tmp_path / "adapter")
    whole = open_model(tmp_path / "adapter", base)
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter"
    )
    read = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    head = torch.nn.Linear(64, ROWS, bias=False)
    name = "lm_head.weight" if "lm_head.weight" in whole.tensors else "model.embed_tokens.weight"
    head.weight.data = torch.from_numpy(whole.read_float32(name))
    read.lm_head = head
    weights = {n: torch.from_numpy(whole.read_float32(n)) for n in whole.tensors}
    read.load_state_dict(weights, strict=False)
    tokens = torch.tensor([[1, 5, 6, 9]])
    torch.testing.assert_close(read(tokens).logits, again(tokens).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_the_head_of_a_tied_base(tmp_path):
    base = save_model(tmp_path / "base", "llama", tie_word_embeddings=True)
    weight = load_file(base / "model.safetensors")["model.embed_tokens.weight"].float()
    a, b = matrices(weight)
    name = f"{PREFIX}lm_head.lora_"
    adapter = save_adapter(tmp_path / "adapter", base, {f"{name}A.weight": a, f"{name}B.weight": b})
    expected = (weight + ALPHA / RANK * (b @ a)).numpy()
    model = open_model(adapter)
    np.testing.assert_allclose(model.read_float32("lm_head.weight"), expected, 1e-5, 1e-4)
    assert np.array_equal(model.read_float32("model.embed_tokens.weight"), weight.numpy())


def test_an_adapter_of_the_embedding(tmp_path, base):
    random = torch.Generator().manual_seed(5)
    a, b = (torch.randn(shape, generator=random) for shape in ((RANK, ROWS), (64, RANK)))
    name = f"{PREFIX}model.embed_tokens.lora_embedding_"
    adapter = save_adapter(tmp_path / "adapter", base, {f"{name}A": a, f"{name}B": b})
    weight = load_file(base / "model.safetensors")["model.embed_tokens.weight"].float()
    expected = weight + ALPHA / RANK * (b @ a).T
    check(adapter, {"model.embed_tokens.weight": expected}, base)


def test_weights_that_are_stored_transposed_and_other_names(tmp_path):
    """GPT-2: Conv1D has (in, out), and published checkpoints lack the prefix `transformer`."""
    base = save_model(tmp_path / "base", "gpt2", n_embd=64, n_head=4, n_layer=2)
    weights = load_file(base / "model.safetensors")
    bare = {name.removeprefix("transformer."): values for name, values in weights.items()}
    save_file(bare, base / "model.safetensors", {"format": "pt"})
    a, b = torch.randn(RANK, 64), torch.randn(192, RANK)
    name = f"{PREFIX}transformer.h.1.attn.c_attn.lora_"
    adapter = save_adapter(
        tmp_path / "adapter", base, {f"{name}A.weight": a, f"{name}B.weight": b},
        fan_in_fan_out=True,
    )  # fmt: skip
    expected = bare["h.1.attn.c_attn.weight"].float() + ALPHA / RANK * (b @ a).T
    check(adapter, {"h.1.attn.c_attn.weight": expected}, base)


def test_an_adapter_of_a_quantised_base_and_one_in_a_bin_file(tmp_path):
    base = save_model(tmp_path / "base", "llama", tie_word_embeddings=False)
    tensors = simple(base)
    to_block_fp8(base, (32, 32))
    dequantised = Checkpoint.open(base).read_float32(f"{QUERY}.weight")
    adapter = save_adapter(tmp_path / "adapter", base, tensors)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({name: values.half() for name, values in tensors.items()},
               adapter / "adapter_model.bin")  # fmt: skip
    a, b = (tensors[f"{PREFIX}{QUERY}.lora_{part}.weight"].half().float() for part in "AB")
    expected = torch.from_numpy(dequantised) + ALPHA / RANK * (b @ a)
    found = Checkpoint.open(adapter).read_float32(f"{QUERY}.weight")
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-4)


def test_peft_merges_the_same(tmp_path, base):
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"], init_lora_weights=False,
        alpha_pattern={"layers.1.mlp.down_proj": 6}, modules_to_save=["lm_head"],
    )  # fmt: skip
    trained = peft.get_peft_model(model, config)
    trained.save_pretrained(tmp_path / "adapter")
    merged = trained.merge_and_unload().state_dict()
    checkpoint = Checkpoint.open(tmp_path / "adapter", base=base)
    for name in checkpoint.tensors:
        np.testing.assert_allclose(checkpoint.read_float32(name), merged[name], 1e-5, 1e-5)


# --- the base ---


@pytest.mark.parametrize("named", ["models/base", "../models/base", "other/Base-bnb-4bit", "gone"])
def test_the_base_is_the_one_that_is_named_or_the_one_at_hand(
    tmp_path, base, named, monkeypatch, capsys
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(base.parent.parent)
    folder = base.parent.parent / "adapters"
    folder.mkdir(exist_ok=True)
    tensors = simple(base)
    if named == "models/base":
        named = f"{base.parent.name}/base"
    elif named == "../models/base":
        named = f"../{base.parent.name}/base"
    adapter = save_adapter(folder / f"{tmp_path.name}", named, tensors)
    check(adapter, added(base, tensors, ALPHA / RANK), base, at_hand=base)
    assert ("which is not here; it is applied to" in capsys.readouterr().err) == (named == "gone")


def test_without_a_base_the_message_names_it(tmp_path, base, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for named in ("gone", "org/gone"):
        adapter = save_adapter(tmp_path / "adapter", named, simple(base))
        with pytest.raises(UserError, match=f"is a LoRA adapter of {named}"):
            Checkpoint.open(adapter)


# --- what is refused ---

REFUSED = [
    ({"peft_type": "IA3"}, {}, "IA3"),
    ({"use_dora": True}, {}, "DoRA"),
    ({"init_lora_weights": "pissa_niter_4"}, {}, "pissa"),
    ({"target_parameters": ["experts.gate_up_proj"]}, {}, "target_parameters"),
    ({"trainable_token_indices": [1]}, {}, "trainable_token_indices"),
    ({}, {f"{PREFIX}{QUERY}.lora_magnitude_vector": torch.ones(64)}, "lora_magnitude_vector"),
    ({}, {f"{PREFIX}model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}, "layers.9"),
    ({}, {f"{PREFIX}score.weight": torch.ones(2, 64)}, "score.weight"),
    ({}, {f"{PREFIX}{QUERY}.lora_A.weight": torch.ones(4, 63)}, "(4, 63)"),
    ({}, {f"{PREFIX}lm_head.weight": torch.ones(ROWS, 32)}, "lm_head"),
    ({"r": 8}, {}, "rank 8"),
    ({"lora_alpha": None}, {}, "lora_alpha"),
]


@pytest.mark.parametrize(("config", "tensors", "word"), REFUSED)
def test_other_adapters_are_refused(tmp_path, base, config, tensors, word):
    adapter = save_adapter(tmp_path / "adapter", base, simple(base) | tensors, **config)
    with pytest.raises(UserError) as caught:
        Checkpoint.open(adapter)
    assert word in str(caught.value)
    assert str(adapter) in str(caught.value)


def test_half_an_adapter_and_one_too_many(tmp_path, base):
    tensors = simple(base)
    del tensors[f"{PREFIX}{QUERY}.lora_B.weight"]
    adapter = save_adapter(tmp_path / "adapter", base, tensors)
    with pytest.raises(UserError, match="only one of the two matrices"):
        Checkpoint.open(adapter)
    (adapter / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"a whole model .* and an adapter"):
        Checkpoint.open(adapter)
    (adapter / "model.safetensors").unlink()
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="no adapter_model"):
        Checkpoint.open(adapter)


# --- names of wrappers ---


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("_orig_mod.", ""),
        ("module.", ""),
        ("module._orig_mod.", ""),
        ("_orig_mod.module.", ""),
        ("base_model.model.", ""),
        ("_forward_module.module.", ""),
        ("", "_orig_mod."),
        ("", "_checkpoint_wrapped_module."),
    ],
)
def test_wrappers_are_not_part_of_names(tmp_path, base, before, after):
    weights = load_file(base / "model.safetensors")
    renamed = {}
    for name, values in weights.items():
        head, layer, rest = name.partition("layers.0.")
        renamed[f"{before}{head}{layer}{after if layer else ''}{rest}"] = values
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(renamed, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.tensors) == set(weights)
    assert all(
        np.array_equal(checkpoint.read_float32(name), weights[name].float()) for name in weights
    )
    assert (checkpoint.unchanged_files == {"model.safetensors"}) == (not before and not after)


def test_two_tensors_of_one_plain_name(tmp_path):
    save_file({"a.weight": torch.ones(2), "module.a.weight": torch.ones(2)},
              tmp_path / "model.safetensors")  # fmt: skip
    with pytest.raises(UserError, match=r"a\.weight under two names"):
        Checkpoint.open(tmp_path)
