"""Activation checkpointing: what the forward pass of a layer keeps for the backward pass.

none        every activation
full        each layer's input; the layer is computed again in the backward pass
selective   also the results of attention and of every second matmul; the rest, which is cheap,
            is computed again
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.attention.varlen  # defines an operation that is named below
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Recompute = Literal["none", "full", "selective"]

_aten = torch.ops.aten
MATMULS = {_aten.mm.default, _aten.addmm.default, _aten._scaled_mm.default}
ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.higher_order.flex_attention,
}


def apply_recompute(layers: nn.ModuleList, mode: Recompute) -> None:
    """Let each layer keep only what `mode` says. Call it before compiling and sharding.

    There is no dropout, so random states are not restored.
    """
    if mode == "none":
        return
    for layer in layers:
        # replacing forward keeps the parameters' names and the attributes that decoders look for
        layer.forward = _recomputed(layer.forward, mode)


def _recomputed(forward: Callable[..., Any], mode: Recompute) -> Callable[..., Any]:
    """A plain function, which torch.compile traces; it would skip a `functools.partial`."""
    contexts: dict[str, Any] = {"context_fn": _selective_contexts} if mode == "selective" else {}

    def recomputed(*arguments: Any, **names: Any) -> Any:
        return checkpoint(
            forward, *arguments, use_reentrant=False, preserve_rng_state=False, **contexts, **names
        )

    return recomputed


def _selective_contexts() -> tuple[Any, Any]:
    """A policy that counts matmuls in the forward pass and in the recomputation separately."""
    return create_selective_checkpoint_contexts(_policy())  # type: ignore[no-any-return, no-untyped-call]


def _policy() -> Callable[..., CheckpointPolicy]:
    seen = {False: 0, True: 0}  # matmuls so far, in the forward pass and in the recomputation

    def policy(context: Any, operation: Any, *arguments: Any, **names: Any) -> CheckpointPolicy:
        if operation in ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if operation in MATMULS:
            seen[context.is_recompute] += 1
            if seen[context.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy
