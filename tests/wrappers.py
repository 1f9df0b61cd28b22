"""Small random wrappers: text decoders with a tower of images or sound in front of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from cpt_merge.checkpoint.text_models import text_decoder

VOCABULARY = 320
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
HEADS = {**TEXT, "head_dim": 8}
SLIDING = {
    **HEADS,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 8,
}
TOWER: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
QWEN_TOWER = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
}


def _gemma3() -> Any:
    return transformers.Gemma3Config(
        vision_config=TOWER, text_config=SLIDING, mm_tokens_per_image=4, image_token_index=7
    )


def _mistral3() -> Any:
    pixtral = {**TOWER, "model_type": "pixtral", "head_dim": 8}
    return transformers.Mistral3Config(
        vision_config=pixtral, text_config={**HEADS, "model_type": "mistral"}, image_token_index=7
    )


def _llava() -> Any:
    clip, llama = {**TOWER, "model_type": "clip_vision_model"}, {**TEXT, "model_type": "llama"}
    return transformers.LlavaConfig(vision_config=clip, text_config=llama, image_token_index=7)


def _qwen2_5_vl() -> Any:
    return transformers.Qwen2_5_VLConfig(
        vision_config=QWEN_TOWER, text_config={**TEXT, "rope_parameters": MROPE}, image_token_id=7
    )


def _qwen3_vl() -> Any:
    tower = {**QWEN_TOWER, "deepstack_visual_indexes": [0]}
    return transformers.Qwen3VLConfig(
        vision_config=tower, text_config={**HEADS, "rope_parameters": MROPE}, image_token_id=7
    )


def _llama4() -> Any:
    text = {
        **HEADS, "intermediate_size_mlp": 48, "moe_layers": [], "no_rope_layers": [1, 0],
        "attention_chunk_size": 128, "layer_types": ["full_attention", "full_attention"],
    }  # fmt: skip
    tower = {
        **TOWER,
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    }
    return transformers.Llama4Config(vision_config=tower, text_config=text, image_token_index=7)


def _voxtral() -> Any:
    tower = {
        "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_mel_bins": 8,
        "max_source_positions": 8,
    }  # fmt: skip
    llama = {**TEXT, "model_type": "llama"}
    return transformers.VoxtralConfig(audio_config=tower, text_config=llama, audio_token_id=7)


def _got_ocr2() -> Any:
    """Its tower has an attention of its own."""
    tower = {
        **TOWER,
        "mlp_dim": 24,
        "output_channels": 8,
        "global_attn_indexes": [],
        "window_size": 2,
    }
    qwen2 = {**TEXT, "model_type": "qwen2"}
    return transformers.GotOcr2Config(vision_config=tower, text_config=qwen2, image_token_index=7)


def _smolvlm() -> Any:
    """Its forward pass moves embeddings to the device of the ids."""
    llama = {**TEXT, "model_type": "llama"}
    return transformers.SmolVLMConfig(vision_config=TOWER, text_config=llama, image_token_id=7)


def _gemma4() -> Any:
    """Its forward pass looks at the row of the padding, and at a second table by token."""
    text = {
        **SLIDING, "pad_token_id": 0, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCABULARY,
        "num_kv_shared_layers": 0,
    }  # fmt: skip
    tower = {**TOWER, "num_key_value_heads": 2, "head_dim": 8}
    return transformers.Gemma4Config(vision_config=tower, text_config=text, image_token_id=7)


WRAPPERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "gemma3": ("Gemma3ForConditionalGeneration", _gemma3),
    "mistral3": ("Mistral3ForConditionalGeneration", _mistral3),
    "llava": ("LlavaForConditionalGeneration", _llava),
    "qwen2.5-vl": ("Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl),
    "qwen3-vl": ("Qwen3VLForConditionalGeneration", _qwen3_vl),
    "llama4": ("Llama4ForConditionalGeneration", _llama4),
    "got-ocr2": ("GotOcr2ForConditionalGeneration", _got_ocr2),
    "smolvlm": ("SmolVLMForConditionalGeneration", _smolvlm),
    "gemma4": ("Gemma4ForConditionalGeneration", _gemma4),
    "voxtral": ("VoxtralForConditionalGeneration", _voxtral),
}


def make_wrapper(
    folder: Path,
    family: str,
    tied: bool = False,
    seed: int = 0,
    vocabulary: int = VOCABULARY,
    image: int = 7,
    text: dict[str, Any] | None = None,
) -> Any:
    """A random wrapper of the family, written to `folder` as transformers does, and returned; `text`
    changes its decoder."""
    name, build = WRAPPERS[family]
    config = build()
    for field, value in (text or {}).items():
        setattr(config.text_config, field, value)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    config.text_config.vocab_size = vocabulary
    for field in ("image_token_id", "image_token_index", "audio_token_id"):
        if field in config.to_dict():
            setattr(config, field, image)
    torch.manual_seed(0)
    model = getattr(transformers, name)._from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():  # far from uniform logits, so that every difference shows
        torch.nn.init.normal_(parameter, mean=0.5 if parameter.ndim == 1 else 0.0, std=0.3)
    torch.manual_seed(seed)
    with torch.no_grad():  # siblings of seed 0
        for parameter in model.parameters() if seed else ():
            parameter += 0.02 * torch.randn_like(parameter)
    model.tie_weights()
    model.save_pretrained(folder)
    return model


TEXT_ONLY = {"qwen2.5-vl": "Qwen2ForCausalLM", "qwen3-vl": "Qwen3ForCausalLM"}
"""The text model with a wrapper's tensors, where transformers has no class of the decoder alone."""


def make_text_only(folder: Path, family: str, wrapper: Any) -> Any:
    """The text decoder of a wrapper as a model of its own, written to `folder` and returned."""
    text = wrapper.config.text_config
    if family in TEXT_ONLY:
        architecture = getattr(transformers, TEXT_ONLY[family])
        sizes = {name: getattr(text, name) for name in HEADS if hasattr(text, name)}
        text = architecture.config_class(**sizes, tie_word_embeddings=text.tie_word_embeddings)
        model = architecture(text)
    else:
        model = transformers.AutoModelForCausalLM.from_config(text)
    model.model.load_state_dict(text_decoder(wrapper).state_dict())
    model.get_output_embeddings().load_state_dict(wrapper.get_output_embeddings().state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    return model.eval()
