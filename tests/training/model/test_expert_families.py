"""Families with experts: whatever mapping transformers has for them is followed in both directions."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor

from cpt_merge.checkpoint.export import LocalShard
from cpt_merge.checkpoint.stored_shards import check_divisible, replaced_shards, stored_shards
from cpt_merge.data.packing import IGNORED
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.model.build import CausalLM, build_model, load_weights
from cpt_merge.training.model.routing import describe_experts
from cpt_merge.training.phases import phases_of, select_trained
from tests.training.conftest import CONFIG
from tests.training.families import EXPERTS, SIZES, documents

HEADS = {**SIZES, "head_dim": 8}
SHARED = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
BALANCED: dict[str, tuple[str, dict[str, Any]]] = {  # with an auxiliary loss
    "mixtral": ("MixtralConfig", {**SIZES, "num_local_experts": 4}),
    "qwen2-moe": ("Qwen2MoeConfig", {**SIZES, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24}),
    "qwen3-moe": ("Qwen3MoeConfig", {**HEADS, **EXPERTS, "num_experts": 4}),
    "qwen3.5-moe": ("Qwen3_5MoeTextConfig", {
        **HEADS, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16, "layer_types": ["full_attention"] * 2,
    }),
    "olmoe": ("OlmoeConfig", {**SIZES, **EXPERTS, "num_experts": 4}),
    "flex-olmo": ("FlexOlmoConfig", {**SIZES, **EXPERTS, "num_experts": 4}),
    "granite-moe": ("GraniteMoeConfig", {**SIZES, **EXPERTS, "num_local_experts": 4}),
    "phimoe": ("PhimoeConfig", {**SIZES, **EXPERTS, "num_local_experts": 4}),
    "minimax-m2": ("MiniMaxM2Config", {**HEADS, **EXPERTS, "num_local_experts": 4}),
    "ernie-4.5": ("Ernie4_5_MoeConfig", {**SIZES, **EXPERTS, "moe_num_experts": 4, "moe_k": 2}),
    "gpt-oss": ("GptOssConfig", {**HEADS, **EXPERTS, "num_local_experts": 4, "sliding_window": 6}),
}  # fmt: skip
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek-v3": ("DeepseekV3Config", {
        **HEADS, **EXPERTS, **SHARED, **LATENT, "num_key_value_heads": 4, "n_routed_experts": 8,
    }),
    "glm4-moe": ("Glm4MoeConfig", {**HEADS, **EXPERTS, **SHARED, "n_routed_experts": 4}),
    "dots1": ("Dots1Config", {**HEADS, **EXPERTS, **SHARED, "n_routed_experts": 4}),
    "hunyuan": ("HunYuanMoEV1Config", {**HEADS, **EXPERTS, "num_experts": 4, "moe_topk": 2}),
    "exaone-moe": ("ExaoneMoeConfig", {**HEADS, **EXPERTS, "num_experts": 4, "sliding_window": 6}),
    "cohere2-moe": ("Cohere2MoeConfig", {**HEADS, **EXPERTS, "num_experts": 4, "sliding_window": 6}),
}  # fmt: skip
QUICK = ("mixtral", "gpt-oss", "ernie-4.5")


def made(folder: Path, family: str) -> tuple[Any, CausalLM]:
    """A random model of the family as transformers has it, and as it is loaded here."""
    name, values = {**BALANCED, **OTHERS}[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**values, "tie_word_embeddings": False})
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.5 if parameter.ndim == 1 else 0.0, std=0.3)
    model.save_pretrained(folder)
    module = build_model(folder, TrainingConfig(**{**CONFIG, "loss_chunk": 7}))
    load_weights(module, folder, torch.device("cpu"))
    return model, module


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        (
            "JetMoeConfig",
            {"num_local_experts": 4, "kv_channels": 8},
            "4 in 2 layers, ",
        ),  # 2 routers
        ("DeepseekV3Config", OTHERS["deepseek-v3"][1], "8 in 1 layer, "),
        ("DogeConfig", {"is_moe": False, "num_experts": 16}, None),
    ],
)
def test_layers_with_experts_are_counted(
    name: str, values: dict[str, Any], said: str | None
) -> None:
    config = getattr(transformers, name)(**{**SIZES, **EXPERTS, **values})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    found = describe_experts(model, None).get("experts")
    assert found is None if said is None else str(found).startswith(said)


def marked(families: dict[str, Any]) -> list[object]:
    return [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in families
    ]


@pytest.mark.parametrize("family", marked({**BALANCED, **OTHERS}))
@pytest.mark.parametrize("size", [1, 3])
def test_rows_of_the_model_are_rows_of_its_files(family: str, size: int, tmp_path: Path) -> None:
    """All processes together have every element of the files once, and take new ones back."""
    _, module = made(tmp_path, family)
    check_divisible(module.stored, tmp_path)
    files = load_file(tmp_path / "model.safetensors")
    names = module.stored_parameters()
    found: dict[str, list[LocalShard]] = {}
    for rank in range(size):
        mine = []
        for name, parameter in module.model.named_parameters():
            rows = -(-len(parameter) // size)
            part = parameter.detach()[rank * rows : (rank + 1) * rows]
            mine.append(
                LocalShard(name, tuple(parameter.shape), min(rank * rows, len(parameter)), part)
            )
        for shard in stored_shards(module.stored, mine):
            found.setdefault(shard.name, []).append(shard)
        doubled = replaced_shards(module.stored, mine, lambda shard: shard.values * 2)
        assert all(torch.equal(values, shard.values * 2) for shard, values in doubled)
    assert found.keys() == names
    for name in names:
        parts = sorted((shard for shard in found[name] if len(shard.values)), key=lambda s: s.start)
        assert torch.equal(torch.cat([shard.values for shard in parts]), files[name]), name
    untrained = files.keys() - names  # biases that balance the experts
    assert all("bias" in name for name in untrained)


def test_what_a_family_does_not_train_by_gradients_stays_frozen(tmp_path: Path) -> None:
    _, module = made(tmp_path, "ernie-4.5")
    select_trained(module, phases_of(TrainingConfig(**CONFIG))[0], 0)
    frozen = [name for name, p in module.model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"]


@pytest.mark.parametrize("family", marked(BALANCED))
def test_loss_and_gradients_with_the_auxiliary_loss_equal_those_of_transformers(
    family: str, tmp_path: Path
) -> None:
    """Without a target in a position, or with logits in chunks, the auxiliary loss stays the same."""
    reference, module = made(tmp_path, family)
    batch = documents(2, (33,))
    batch.labels[:, 5:9] = IGNORED
    output = reference(input_ids=batch.input_ids, output_router_logits=True, use_cache=False)
    targets = int((batch.labels != IGNORED).sum())
    nats = F.cross_entropy(
        output.logits.flatten(0, 1).float(), batch.labels.flatten(), reduction="sum"
    )
    coefficient = reference.router_aux_loss_coef
    (nats / targets + 100 * coefficient * output.aux_loss).backward()
    assert module.auxiliary is not None
    assert module.auxiliary.coefficient == pytest.approx(coefficient)
    module.weigh_auxiliary(1 / targets, 1)
    module.auxiliary_weight *= 100  # so that it shows in every gradient of a router
    loss: Tensor = module(batch) / targets
    loss.backward()
    routing = module.take_routing()
    assert routing is not None
    assert loss.item() == pytest.approx(nats.item() / targets, rel=1e-5)
    assert routing[0].item() == pytest.approx(output.aux_loss.item(), rel=1e-5)
    for (name, mine), theirs in zip(
        module.model.named_parameters(), reference.parameters(), strict=True
    ):
        if theirs.grad is None:  # a bias that balances the experts
            assert mine.grad is None, name
            assert not mine.requires_grad, name
            continue
        assert mine.grad is not None
        largest = float(theirs.grad.abs().max())
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-3, atol=2e-5 * largest), name
