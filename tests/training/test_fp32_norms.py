"""What the source says about norms is what they keep."""

import importlib
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cpt_merge.training.norms import _folder, multiply_in_fp32

WIDTH = 64
NORMS = {
    "llama": "LlamaRMSNorm",
    "llama4": "Llama4TextRMSNorm",
    "qwen3_next": "Qwen3NextRMSNorm",
    "gemma3": "Gemma3RMSNorm",
    "gemma3n": "Gemma3nRMSNorm",
    "gemma4": "Gemma4RMSNorm",
    "olmo2": "Olmo2RMSNorm",
    "gpt_oss": "GptOssRMSNorm",
    "cohere2": "Cohere2LayerNorm",
    "helium": "HeliumRMSNorm",
    "mamba2": "Mamba2RMSNorm",
    "mixtral": "MixtralRMSNorm",
}


def kept_in_fp32(norm: nn.Module) -> int:
    """Tensors of the input's size that autograd keeps in fp32."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hidden = torch.randn(4, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = norm(hidden)
    del result
    return sum(one.dtype == torch.float32 and one.shape == (4, WIDTH) for one in kept.values())


@pytest.mark.parametrize("family", NORMS)
def test_a_product_in_fp32_keeps_the_normalised_input_in_fp32(family: str) -> None:
    """That is, besides what the root needs: the input, or its difference to the mean twice."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    norm = getattr(module, NORMS[family])(WIDTH).to(torch.bfloat16)
    frozen = getattr(module, NORMS[family])(WIDTH).to(torch.bfloat16).requires_grad_(False)
    more = kept_in_fp32(norm) - kept_in_fp32(frozen)
    assert more == multiply_in_fp32(family)


def test_the_folder_of_every_family_is_found() -> None:
    models = Path(transformers.__file__).parent / "models"
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        expected = models / model_type_to_module_name(model_type)
        found = _folder(model_type)
        same = {path.name for path in expected.glob("modeling_*.py")}
        assert not same or found == expected, model_type


def test_parts_of_a_family_have_its_norms() -> None:
    assert multiply_in_fp32("gemma3n_text")
    assert not multiply_in_fp32("qwen3_vl_text")
    assert not multiply_in_fp32("")
    assert not multiply_in_fp32("nobody-knows-this")
