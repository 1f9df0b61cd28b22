"""Small random models of many families, for what has to hold in all of them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import transformers

from cpt_merge.data.packing import IGNORED, Batch

SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
GPT2 = {
    "vocab_size": 100,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GEMMA = {**SIZES, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES),
    "llama3-rope": (
        "LlamaConfig",
        {**SIZES, "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }},
    ),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 6}),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**GEMMA, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", GEMMA),
    "phi3": ("Phi3Config", SIZES),
    "gpt-neox": ("GPTNeoXConfig", SIZES),
    "gpt2": ("GPT2Config", GPT2),
    "olmo2": ("Olmo2Config", SIZES),
    "cohere": ("CohereConfig", {**SIZES, "logit_scale": 0.3}),
    "granite": ("GraniteConfig", {**SIZES, "logits_scaling": 6.0, "embedding_multiplier": 3.0}),
    "stablelm": ("StableLmConfig", SIZES),
    "starcoder2": ("Starcoder2Config", {**SIZES, "sliding_window": None}),
    "phi": ("PhiConfig", SIZES),  # its head has a bias
    "smollm3": ("SmolLM3Config", SIZES),
    "mixtral": ("MixtralConfig", {**SIZES, "num_local_experts": 4}),
    "qwen3-moe": ("Qwen3MoeConfig", {**SIZES, "head_dim": 8, **EXPERTS, "num_experts": 4}),
    "granite-moe": ("GraniteMoeConfig", {**SIZES, **EXPERTS, "num_local_experts": 4}),  # stored together
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            **SIZES, **EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
            "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
            "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8,
        },
    ),
    "exaone4": ("Exaone4Config", {**SIZES, "head_dim": 8, "sliding_window": 6}),
    "hyperclovax": ("HyperCLOVAXConfig", {**SIZES, "logits_scaling": 0.5}),  # multiplies where granite divides
    "cohere2": ("Cohere2Config", {**SIZES, "head_dim": 8, "sliding_window": 6}),
    "olmo3": ("Olmo3Config", {**SIZES, "head_dim": 8}),
    "glm4": ("Glm4Config", {**SIZES, "head_dim": 8}),
}  # fmt: skip


# families with layers that carry a state along the sequence, or mix neighbours
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2,
          "mamba_d_conv": 4, "mamba_chunk_size": 8}  # fmt: skip
_DELTA = {**SIZES, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
          "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
_RECURRENT = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", {**_RECURRENT, "state_size": 4}),
    "mamba-2": (
        "Mamba2Config",
        {
            **_RECURRENT,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "falcon-mamba": ("FalconMambaConfig", {**_RECURRENT, "state_size": 4}),
    "rwkv": ("RwkvConfig", {**_RECURRENT, "context_length": 128}),
    "qwen3-next": ("Qwen3NextConfig", {**_DELTA, "num_experts": 0}),
    "qwen3.5": ("Qwen3_5TextConfig", _DELTA),
    "granite-4": (
        "GraniteMoeHybridConfig",
        {
            **SIZES,
            **_MAMBA,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
        },
    ),
    "falcon-h1": ("FalconH1Config", {**SIZES, **_MAMBA, "mamba_d_ssm": 64, "head_dim": 8}),
    "nemotron-h": (
        "NemotronHConfig",
        {
            **SIZES,
            "head_dim": 8,
            "layers_block_type": ["mamba", "attention", "mlp"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
        },
    ),
    "zamba2": (
        "Zamba2Config",
        {
            **SIZES,
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "mamba_d_state": 8,
            "n_mamba_heads": 4,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "adapter_rank": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        },
    ),
    "bamba": (
        "BambaConfig",
        {**SIZES, **_MAMBA, "attn_layer_indices": [1], "num_hidden_layers": 2},
    ),
    "jamba": (
        "JambaConfig",
        {
            **SIZES,
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "lfm2": (
        "Lfm2Config",
        {**SIZES, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "recurrent-gemma": (
        "RecurrentGemmaConfig",
        {
            **SIZES,
            "block_types": ["recurrent", "attention"],
            "attention_window_size": 16,
            "num_hidden_layers": 3,
            "head_dim": 8,
        },
    ),
}

# families whose own code lets packed documents see each other
LEAKING: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-oss": (
        "GptOssConfig",
        {**SIZES, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    ),
    "falcon": ("FalconConfig", {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}),
    "bloom": ("BloomConfig", {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "opt": ("OPTConfig", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
}  # fmt: skip


def make_family(folder: Path, family: str, tied: bool, **changes: Any) -> Any:
    """A random model of the family, written to `folder` and returned."""
    name, values = {**FAMILIES, **LEAKING, **HYBRIDS}[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**values, **changes, "tie_word_embeddings": tied})
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    for (
        parameter
    ) in model.parameters():  # so that biases and norms count, and logits are far from uniform
        torch.nn.init.normal_(parameter, mean=0.5 if parameter.ndim == 1 else 0.0, std=0.3)
    for name, buffer in model.named_buffers():
        if name in model.state_dict():  # the bias of a router
            torch.nn.init.normal_(buffer, std=0.3)
    model.tie_weights()
    model.save_pretrained(folder)
    return model


def documents(
    rows: int, lengths: tuple[int, ...] = (7, 12, 1, 13), vocabulary: int = 100, seed: int = 0
) -> Batch:
    """Sequences with documents of these lengths, shifted by one document each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocabulary, (rows, sum(lengths)), generator=generator)
    labels, positions = ids.roll(-1, 1), torch.empty_like(ids)
    for row in range(rows):
        shifted = [*lengths[row % len(lengths) :], *lengths[: row % len(lengths)]]
        positions[row] = torch.cat([torch.arange(length) for length in shifted])
        labels[row, torch.tensor(shifted).cumsum(0) - 1] = IGNORED
    return Batch.of(ids, labels, positions)


def apart(batch: Batch) -> list[Batch]:
    """Each document of the batch as a separate batch."""
    parts, (rows, length) = [], batch.input_ids.shape
    for row in range(rows):
        starts = [*torch.where(batch.position_ids[row] == 0)[0].tolist(), length]
        for start, stop in itertools.pairwise(starts):
            cut = (
                tensor[row : row + 1, start:stop]
                for tensor in (batch.input_ids, batch.labels, batch.position_ids)
            )
            parts.append(Batch.of(*(tensor.clone() for tensor in cut)))
    return parts
