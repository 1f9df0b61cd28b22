"""Kinds and layers, by the names that transformers and publishers give to tensors."""

import re

import pytest
import torch
import transformers

from cpt_merge.checkpoint.tensor_kinds import OTHER_MODALITIES, count_layers, kind_of, layer_of

TEXT = {"norm", "embed", "head"}
DENSE = {*TEXT, "attention", "mlp"}
SPARSE = {*TEXT, "attention", "experts", "router"}
SEEING = {*DENSE, "vision", "projector"}

FAMILIES = {
    "LlavaForConditionalGeneration": SEEING,
    "LlavaNextForConditionalGeneration": SEEING,
    "LlavaOnevisionForConditionalGeneration": SEEING,
    "Gemma3ForConditionalGeneration": SEEING,
    "PaliGemmaForConditionalGeneration": SEEING,
    "Qwen2VLForConditionalGeneration": SEEING,
    "Qwen2_5_VLForConditionalGeneration": SEEING,
    "Qwen3VLForConditionalGeneration": SEEING,
    "Qwen3VLMoeForConditionalGeneration": {*SPARSE, "vision", "projector"},
    "MllamaForConditionalGeneration": SEEING,
    "Mistral3ForConditionalGeneration": SEEING,
    "Llama4ForConditionalGeneration": {*SPARSE, "vision", "projector"},
    "IdeficsForVisionText2Text": {*DENSE, "vision", "other"},  # alpha_cross_attn
    "Idefics2ForConditionalGeneration": SEEING,
    "Idefics3ForConditionalGeneration": SEEING,
    "SmolVLMForConditionalGeneration": SEEING,
    "InternVLForConditionalGeneration": SEEING,
    "Glm4vForConditionalGeneration": SEEING,
    "AriaForConditionalGeneration": {*SPARSE, "vision", "projector"},
    "Phi4MultimodalForCausalLM": {*SEEING, "audio"},
    "Qwen2AudioForConditionalGeneration": {*DENSE, "audio", "projector"},
    "GraniteSpeechForConditionalGeneration": {*DENSE, "audio", "projector"},
    "VoxtralForConditionalGeneration": {*DENSE, "audio", "projector"},
    "Qwen3NextForCausalLM": {*SPARSE, "linear_attn"},
    "JambaForCausalLM": {*DENSE, "experts", "router", "mamba"},
    "BambaForCausalLM": {*DENSE, "mamba"},
    "FalconH1ForCausalLM": {*DENSE, "mamba"},
    "GraniteMoeHybridForCausalLM": {*SPARSE, "mamba", "mlp"},
    "Zamba2ForCausalLM": {*DENSE, "mamba", "other"},  # between the shared block and Mamba
    "NemotronHForCausalLM": {*TEXT, "mixer", "experts", "router"},
    "Mamba2ForCausalLM": {*TEXT, "mixer"},
    "Lfm2ForCausalLM": {*DENSE, "mixer"},
    "GptOssForCausalLM": SPARSE,
    "DeepseekV3ForCausalLM": {*SPARSE, "mlp"},
    "MixtralForCausalLM": SPARSE,
    "OlmoeForCausalLM": SPARSE,
    "Qwen3MoeForCausalLM": SPARSE,
    "GPTNeoXForCausalLM": DENSE,
    "FalconForCausalLM": DENSE,
    "BloomForCausalLM": DENSE,
    "OPTForCausalLM": {*DENSE, "other"},  # positions
}
TEXT_LAYERS, OTHER_LAYERS = 4, 6
EVERY_LAYER = {  # settings with which four layers have all kinds of layers of the family
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention"] * 2},
    "Zamba2ForCausalLM": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "NemotronHForCausalLM": {"layers_block_type": ["mamba", "moe", "attention", "mlp"]},
    "Lfm2ForCausalLM": {"layer_types": ["conv", "full_attention"] * 2},
    "Qwen3NextForCausalLM": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "FalconH1ForCausalLM": {},
    "Mamba2ForCausalLM": {},
}


def shrink(config, layers):
    """Few layers and experts; towers get more layers than the text decoder."""
    for field in ("num_hidden_layers", "n_layer", "depth", "num_layers", "encoder_layers"):
        if isinstance(getattr(config, field, None), int):
            setattr(config, field, layers)
    for field in ("num_experts", "num_local_experts", "n_routed_experts", "num_global_layers"):
        if isinstance(getattr(config, field, None), int):
            setattr(config, field, min(getattr(config, field), 8))
    for name, section in list(vars(config).items()):
        if isinstance(section, transformers.PretrainedConfig):
            shrink(section, TEXT_LAYERS if name == "text_config" else OTHER_LAYERS)


@pytest.mark.parametrize("family", FAMILIES)
def test_kinds_and_layers_of_a_family(family):
    cls = getattr(transformers, family)
    sizes = {"num_hidden_layers": TEXT_LAYERS, **EVERY_LAYER.get(family, {})}
    config = cls.config_class(**sizes) if family in EVERY_LAYER else cls.config_class()
    shrink(config, TEXT_LAYERS)
    with torch.device("meta"):
        names = list(cls(config).state_dict())
    assert {kind_of(name) for name in names} == FAMILIES[family]
    assert count_layers(names) == TEXT_LAYERS
    for name in names:
        if kind_of(name) in OTHER_MODALITIES:
            assert layer_of(name) is None, name
        elif re.search(r"\.(layers|h|blocks)\.\d+\.", name):
            assert layer_of(name) is not None, name


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        # LLaVA 1.5 as published, and its conversion
        ("model.vision_tower.vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight", "vision", None),
        ("model.mm_projector.0.weight", "projector", None),
        ("multi_modal_projector.linear_1.weight", "projector", None),
        ("language_model.model.layers.5.self_attn.q_proj.weight", "attention", 5),
        ("language_model.lm_head.weight", "head", None),
        ("language_model.model.embed_tokens.weight", "embed", None),
        ("model.image_newline", "projector", None),
        # Qwen 2 VL and 2.5 VL as published
        ("visual.blocks.7.attn.qkv.weight", "vision", None),
        ("visual.merger.mlp.0.weight", "projector", None),
        ("visual.deepstack_merger_list.0.linear_fc1.weight", "projector", None),
        # Mllama as published: the layers with cross-attention are numbered with the others
        ("language_model.model.layers.3.cross_attn.q_proj.weight", "attention", 3),
        ("language_model.model.layers.3.cross_attn_attn_gate", "attention", 3),
        ("language_model.model.layers.3.cross_attn_mlp_gate", "mlp", 3),
        ("vision_model.global_transformer.layers.2.mlp.fc1.weight", "vision", None),
        # Pixtral and Mistral 3 in Mistral's own format
        ("vision_encoder.transformer.layers.0.attention.wq.weight", "vision", None),
        ("vision_language_adapter.w_in.weight", "projector", None),
        ("layers.3.attention.wq.weight", "attention", 3),
        ("layers.3.feed_forward.w1.weight", "mlp", 3),
        ("tok_embeddings.weight", "embed", None),
        ("output.weight", "head", None),
        # InternVL, MiniCPM-V, Molmo, DeepSeek-VL2 and Phi 3 vision as published
        ("vision_model.encoder.layers.2.attn.qkv.weight", "vision", None),
        ("mlp1.1.weight", "projector", None),
        ("language_model.model.tok_embeddings.weight", "embed", None),
        ("language_model.output.weight", "head", None),
        ("vpm.encoder.layers.1.mlp.fc1.weight", "vision", None),
        ("resampler.attn.in_proj_weight", "projector", None),
        ("llm.model.layers.1.mlp.up_proj.weight", "mlp", 1),
        ("model.vision_backbone.image_vit.transformer.resblocks.0.mlp.c_fc.weight", "vision", None),
        ("vision.blocks.4.attn.qkv.weight", "vision", None),
        ("projector.layers.0.weight", "projector", None),
        ("language.model.layers.2.mlp.gate.weight", "router", 2),
        ("model.vision_embed_tokens.img_processor.vision_model.encoder.layers.0.mlp.fc1.weight", "vision", None),
        ("model.vision_embed_tokens.img_projection.0.weight", "projector", None),
        # Phi 4 multimodal as published, with its adapters
        ("model.embed_tokens_extend.audio_embed.encoder.encoders.3.self_attn.linear_q.weight", "audio", None),
        ("model.embed_tokens_extend.audio_embed.audio_projection.speech.0.weight", "projector", None),
        ("model.embed_tokens_extend.image_embed.img_projection.0.weight", "projector", None),
        ("model.layers.2.self_attn.qkv_proj.lora_A.vision.weight", "vision", None),
        ("model.layers.2.self_attn.qkv_proj.base_layer.weight", "attention", 2),
        # Gemma 3n, as transformers stores it
        ("model.language_model.embed_tokens_per_layer.weight", "embed", None),
        ("model.language_model.layers.2.per_layer_input_gate.weight", "other", 2),
        ("model.vision_tower.timm_model.blocks.1.0.conv_exp.weight", "vision", None),
        ("model.audio_tower.conformer.4.ffw_layer_end.ffw_layer_1.weight", "audio", None),
        ("model.embed_vision.embedding.weight", "projector", None),
        ("model.embed_audio.embedding_projection.weight", "projector", None),
        # experts one by one and fused
        ("model.layers.1.block_sparse_moe.experts.3.w1.weight", "experts", 1),
        ("model.layers.1.block_sparse_moe.gate.weight", "router", 1),
        ("model.layers.1.block_sparse_moe.input_linear.weight", "experts", 1),  # Granite
        ("model.layers.1.block_sparse_moe.router.layer.weight", "router", 1),
        ("model.layers.1.shared_mlp.input_linear.weight", "mlp", 1),
        ("model.layers.1.mlp.experts.gate_up_proj_blocks", "experts", 1),  # gpt-oss
        ("model.layers.1.mlp.router.weight", "router", 1),
        ("model.layers.1.self_attn.sinks", "attention", 1),
        ("model.layers.1.mlp.experts.7.down_proj.weight", "experts", 1),
        ("model.layers.1.mlp.shared_experts.up_proj.weight", "experts", 1),
        ("model.layers.1.mlp.shared_expert_gate.weight", "router", 1),
        ("model.layers.1.mlp.gate.e_score_correction_bias", "router", 1),
        ("model.layers.1.feed_forward.experts.gate_up_proj", "experts", 1),  # Llama 4
        ("model.layers.1.feed_forward.shared_expert.down_proj.weight", "experts", 1),
        ("transformer.blocks.1.ffn.experts.mlp.w1", "experts", 1),  # DBRX
        ("transformer.blocks.1.ffn.router.layer.weight", "router", 1),
        # hybrids
        ("backbone.layers.1.mixer.A_log", "mixer", 1),
        ("backbone.layers.1.mixer.norm.weight", "norm", 1),
        ("backbone.embeddings.weight", "embed", None),
        ("model.layers.1.mamba.dt_bias", "mamba", 1),
        ("model.layers.1.linear_attn.in_proj_qkvz.weight", "linear_attn", 1),
        # prediction of further tokens
        ("model.layers.61.shared_head.head.weight", "other", 61),
        ("mtp.layers.0.self_attn.q_proj.weight", "attention", None),
        ("mtp.embed_tokens.weight", "other", None),
        # others
        ("model.layers.0.mlp.gate_proj.weight", "mlp", 0),
        ("transformer.encoder.layers.4.self_attention.query_key_value.weight", "attention", 4),  # ChatGLM
        ("transformer.output_layer.weight", "head", None),
        ("transformer.embedding.word_embeddings.weight", "embed", None),
        ("gpt_neox.layers.2.attention.query_key_value.weight", "attention", 2),
        ("embed_out.weight", "head", None),
        ("model.layers.3.mlp.act_fn.alpha_p", "mlp", 3),  # Apertus
    ],
)  # fmt: skip
def test_kind_and_layer_of_published_names(name, kind, layer):
    assert (kind_of(name), layer_of(name)) == (kind, layer)
