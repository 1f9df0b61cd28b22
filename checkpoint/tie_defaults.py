"""Whether a family's head is tied to its embedding if config.json does not say so."""

from __future__ import annotations

UNTIED = frozenset(
    """
    afmoe apertus arcee axk1 bamba bitnet codegen cwm dbrx deepseek_v2 deepseek_v3 deepseek_v32
    diffllama doge dots1 exaone4 exaone_moe falcon_h1 flex_olmo glm glm4 glm4_moe glm4_moe_lite
    gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid granitemoeshared helium
    hunyuan_v1_dense hunyuan_v1_moe internlm3 jais2 jamba kimi_linear llama longcat_flash mamba2
    mimo_v2_flash minimax minimax_m2 ministral ministral3 mistral mixtral nanochat nemotron
    nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3
    qwen3_moe qwen3_next rwkv seed_oss solar_open stablelm xlstm
    """.split()
)
"""Families of text models, by `model_type`, whose head transformers does not tie by default."""
