"""Linear layers of the decoder in float8, by torchao, on GPUs that compute in it.

Values are scaled by row: each token by its own largest value. With one scale per tensor, torchao's
default, a token's result would depend on all others of the batch, including documents that it must
not see and later tokens; `check_attention` refuses that. Weights stay in their master type.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec

import torch
from torch import nn

from cpt_merge.core.errors import UserError

CAPABILITY = (8, 9)  # the first NVIDIA GPUs with float8 matmuls: Ada and Hopper


def convert_to_fp8(layers: nn.ModuleList, device: torch.device) -> None:
    """Replace the layers' `nn.Linear` by float8 ones; call it before compiling and sharding.

    Raises `UserError` where the GPU or torchao is missing.
    """
    check_capability(device)
    check_torchao()
    float8 = importlib.import_module("torchao.float8")
    config = float8.Float8LinearConfig.from_recipe_name("rowwise")
    float8.convert_to_float8_training(layers, config=config, module_filter_fn=_fits)


def check_capability(device: torch.device) -> None:
    """Raise `UserError` for a device without float8 matmuls."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        raise UserError(
            f"training.fp8 needs a GPU of capability {CAPABILITY[0]}.{CAPABILITY[1]}; "
            "set it to false."
        )


def check_torchao() -> None:
    """Raise `UserError` if torchao is not installed."""
    if find_spec("torchao") is None:
        raise UserError(
            "training.fp8 needs torchao, which is not installed; install it or set fp8 to false."
        )


def _fits(module: nn.Module, name: str) -> bool:
    """float8 matmuls need dimensions that are multiples of 16."""
    return (
        isinstance(module, nn.Linear)
        and module.in_features % 16 == 0
        and module.out_features % 16 == 0
    )
