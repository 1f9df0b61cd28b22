"""FLOPs by formula, against numbers computed by hand and published ones; peaks by name."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from cpt_merge.checkpoint.tensor_kinds import routed_parameters
from cpt_merge.cluster.scaling import flops_of
from cpt_merge.core.errors import UserError
from cpt_merge.training.flops import flops_per_token, mfu, peak_flops
from cpt_merge.training.memory import ModelShape

LLAMA_2_7B = LlamaConfig(
    vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32,
)  # fmt: skip
LLAMA_3_8B = LlamaConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip


def test_llama_2_7b_by_hand() -> None:
    # 6 * (6,738,415,616 - 32,000 * 4,096) = 39,644,061,696; 12 * 32 * 4,096 * 4,096 = 6,442,450,944
    assert flops_per_token(LLAMA_2_7B, 6_738_415_616, 4096) == 46_086_512_640


def test_llama_3_8b_by_hand() -> None:
    # 6 * (8,030,261,248 - 128,256 * 4,096) = 45,029,548,032; 12 * 32 * 4,096 * 8,192 = 12,884,901,888
    assert flops_per_token(LLAMA_3_8B, 8_030_261_248, 8192) == 57_914_449_920


@pytest.mark.parametrize(("rate", "published"), [(5762, 0.33), (6667, 0.39)])
def test_mfu_is_what_torchtitan_published_for_llama_3_8b(rate: float, published: float) -> None:
    flops = flops_per_token(LLAMA_3_8B, 8_030_261_248, 8192)
    assert flops
    assert mfu(rate, flops, peak_flops("NVIDIA H100 80GB HBM3")) == pytest.approx(
        published, abs=0.01
    )


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_counts_once_and_the_look_up_never(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        tie_word_embeddings=tied,
    )  # fmt: skip
    parameters = sum(parameter.numel() for parameter in LlamaForCausalLM(config).parameters())
    layer = 4 * 16 * 32 + 3 * 16 * 24 + 2 * 16  # attention of two heads of 16, MLP, norms
    matrices = 2 * layer + 16 + 100 * 16  # final norm, head
    assert flops_per_token(config, parameters, 8) == 6 * matrices + 12 * 2 * 32 * 8
    assert (
        flops_per_token(config, parameters, 8, frozen=2 * layer)
        == 6 * matrices - 2 * 2 * layer + 12 * 2 * 32 * 8
    )


def test_qwen3_30b_a3b_has_the_parameters_that_its_name_says() -> None:
    """Published: 30.5 B, of which 3.3 B are active; 128 experts, 8 of which a token takes."""
    config = Qwen3MoeConfig(
        vocab_size=151_936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    routed, total = routed_parameters(sizes), sum(sizes.values())
    assert routed == 48 * 128 * 3 * 768 * 2048
    assert total == 30_532_122_624
    shape = ModelShape.of_sizes(config.to_dict(), sizes, "it")
    assert shape.active == 3_353_032_704 == total - routed * 120 // 128
    # 6 * (3,353,032,704 - 151,936 * 2,048) = 18,251,206,656; 12 * 48 * 4,096 * 4,096 = 9,663,676,416
    flops = flops_per_token(config, shape.active, 4096)
    assert flops == flops_of(shape, 4096) == 27_914_883_072
    one_by_one = {
        f"model.layers.{layer}.mlp.experts.{n}.{part}_proj.weight": 768 * 2048
        for layer in range(48) for n in range(128) for part in ("gate", "up", "down")
    }  # fmt: skip
    assert routed_parameters(one_by_one) == routed
    assert routed_parameters({"model.layers.0.mlp.shared_expert.up_proj.weight": 16}) == 0


def test_what_the_formula_is_not_of_has_no_mfu_and_a_line_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert flops_per_token(MambaConfig(), 10**9, 4096) is None
    assert "MFU is not reported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5), ("NVIDIA H100 NVL", 835.5), ("NVIDIA H200", 989.4), ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4), ("NVIDIA B200", 2250), ("NVIDIA L4", 121), ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362), ("NVIDIA A10", 125), ("NVIDIA A10G", 70), ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2), ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090 Ti", 80), ("AMD Instinct MI250X", 191.5), ("AMD Instinct MI300X", 1307.4),
    ],
)  # fmt: skip
def test_a_gpu_is_known_by_the_name_that_torch_gives(name: str, tera: float) -> None:
    assert peak_flops(name) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4080 SUPER", "Quadro RTX 6000", "Tesla V100-SXM2-32GB", "NVIDIA A1000",
    ],
)  # fmt: skip
def test_a_gpu_that_is_not_known_is_an_error_and_not_a_wrong_number(name: str) -> None:
    with pytest.raises(UserError, match=r"set training\.peak_tflops"):
        peak_flops(name)
