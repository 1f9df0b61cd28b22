"""Attention within documents only: four implementations, and a check of the one that is chosen.

    flash   document by document, without a mask: on a GPU by torch's variable-length flash kernel,
            on a CPU by one causal sdpa call per document
    sdpa    torch's scaled_dot_product_attention with a mask [sequences, 1, length, length]
    flex    torch's flex_attention with a block mask, compiled
    eager   matmul and softmax written out; for models that support no other

All but `flash` are those of transformers, which finds documents by the position ids.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from cpt_merge.checkpoint.text_models import text_decoder
from cpt_merge.core.errors import UserError
from cpt_merge.data.packing import IGNORED, Batch
from cpt_merge.training.config import TrainingConfig

AUTOMATIC = ("flash", "flex", "sdpa", "eager")
"""What `attention: auto` tries, the fastest first."""

IMPLEMENTATIONS = {"sdpa": "sdpa", "eager": "eager", "flex": "flex_attention", "flash": "documents"}
"""The recipe's name -> transformers' name."""

TOLERANCE = 1e-5
"""Relative change of a loss that still counts as none. Measured on random models of 7 families: no
change in float32 and bfloat16 where documents are apart, and 1.6e-4 or more where they are not."""

_BF16_PAYS = 512
"""Tokens from which a document's attention in bfloat16 is faster than in float32 on a CPU. Measured
on a Zen 4 with 4 to 32 heads; documents of 16 tokens take 2.6 to 3.6 times as long in bfloat16."""


def document_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document, called by transformers' attention layers.

    `query` is [sequences, heads, length, width]; `key` and `value` have as many or fewer heads. The
    result is [sequences, length, heads, width]. `cu_seq_lens_q` is `Batch.cu_seqlens` and
    `max_length_q` its `max_length`. Raises `UserError` for a model that needs more than this.
    """
    wanted = [name for name in ("softcap", "s_aux", "position_bias") if other.get(name) is not None]
    wanted += ["dropout"] if dropout else []
    if wanted or cu_seq_lens_q is None or max_length_q is None:
        lacking = f"needs {wanted[0]}" if wanted else "does not pass on where documents begin"
        raise UserError(
            f"attention: flash does not fit this model, whose attention {lacking}; set auto."
        )
    window = (
        sliding_window if sliding_window is not None and sliding_window < max_length_q else None
    )
    if torch.compiler.is_compiling() and not query.is_cuda:
        return _by_mask(query, key, value, cu_seq_lens_q, scaling, window), None
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    if query.is_cuda:
        out = _by_kernel(q, k, v, cu_seq_lens_q, max_length_q, scaling, window)
    else:
        out = _by_document(q, k, v, cu_seq_lens_q, scaling, window)
    return out.reshape(query.shape[0], query.shape[2], *out.shape[1:]), None


def _by_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu: Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """All documents at once: tensors [tokens, heads, width]."""
    before = -1 if window is None else window - 1  # earlier tokens that a token sees
    out = varlen_attn(
        query, key, value, cu, cu, longest, longest,
        scale=scale, window_size=(before, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def _by_document(
    query: Tensor, key: Tensor, value: Tensor, cu: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """One document after the other: tensors [tokens, heads, width]."""
    sizes = cu.diff().tolist()
    documents = (
        torch.split(tensor.transpose(0, 1).unsqueeze(0), sizes, 2) for tensor in (query, key, value)
    )
    outs = []
    for size, q, k, v in zip(sizes, *documents, strict=True):
        if size < _BF16_PAYS and q.dtype == torch.bfloat16:
            q, k, v = q.float(), k.float(), v.float()
        mask = None if window is None or window >= size else _band(size, window, q.device)
        outs.append(
            F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            ).to(query.dtype)
        )
    return torch.cat(outs, 2)[0].transpose(0, 1)


def _by_mask(
    query: Tensor, key: Tensor, value: Tensor, cu: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """The same without a loop, for torch.compile on a CPU: [sequences, heads, length, width]."""
    rows, heads, length, _ = query.shape
    places = torch.arange(rows * length, device=cu.device, dtype=cu.dtype)
    document = torch.searchsorted(cu, places, right=True).view(rows, 1, length)
    mask = (document.unsqueeze(-1) == document.unsqueeze(-2)) & _band(
        length, window or length, cu.device
    )
    key, value = (tensor.repeat_interleave(heads // tensor.shape[1], 1) for tensor in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(
        1, 2
    )


def _band(size: int, window: int, device: torch.device) -> Tensor:
    """True where a token (row) sees another (column): itself and the `window` - 1 before it."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril().triu(1 - window)


# No mask is registered under this name, so none is made.
AttentionInterface.register(IMPLEMENTATIONS["flash"], document_attention)


def attention_of(model: Any) -> str:
    """The recipe's name of the attention that a model uses."""
    used = text_decoder(model).config._attn_implementation
    return next((name for name, theirs in IMPLEMENTATIONS.items() if theirs == used), str(used))


def describe_attention(name: str, config: TrainingConfig, device: torch.device) -> str:
    """The attention for the startup summary."""
    if name != "flash":
        return name
    if device.type == "cuda":
        return "flash (torch's variable-length kernel)"
    if config.compile:
        return "flash (on a CPU and compiled: sdpa with a mask)"
    short = "" if config.precision == "fp32" else f", in fp32 below {_BF16_PAYS} tokens"
    return f"flash (on a CPU: sdpa per document{short})"


def check_supported(model: Any, attention: str) -> None:
    """Raises `UserError` if a model does not use the implementation, or needs more than it does."""
    name = type(model).__name__
    if attention_of(model) != attention:
        raise UserError(
            f"attention: {attention} is not what {name} uses ({attention_of(model)}); set auto."
        )
    if attention != "flash":
        return
    text = model.config.get_text_config(decoder=True)
    capped = getattr(text, "attn_logit_softcapping", None)
    if capped or not getattr(text_decoder(model), "_supports_flash_attn", False):
        reason = "caps its attention scores" if capped else "has its own attention"
        raise UserError(f"attention: flash does not fit {name}, which {reason}; set auto.")


def check_device(attention: str, precision: str, device: torch.device) -> None:
    """Raises `UserError` if the implementation does not train on the device, whatever the model."""
    if attention == "flex" and device.type != "cuda":
        raise UserError(
            "attention: flex trains on GPUs only, since torch has no backward pass for others; "
            "set auto."
        )
    if attention == "flash" and device.type == "cuda" and precision == "fp32":
        raise UserError(
            "attention: flash computes in bf16 only; "
            "set training.precision: bf16, or attention: auto."
        )


@torch.no_grad()
def check_attention(module: Any, config: TrainingConfig, device: torch.device) -> None:
    """No silent fallback: the model must not let a token see another document or later tokens.

    `module` is a `CausalLM`, or DeepSpeed's engine of one. It runs on a micro-batch of sequences of
    two documents, of training's shape, since layers that were compiled for another shape first
    would be slower. Called by all processes. Raises `UserError` if a document's loss depends on the
    document before it or on later tokens, or if the implementation does not run here.
    """
    attention = attention_of(module.model)
    advice = "use another base" if config.attention == "auto" else "set training.attention to auto"
    check_device(attention, config.precision, device)
    if attention == "flash" and device.type == "cuda":
        _check_kernel(device)
    rows, length = config.micro_batch_size, max(config.sequence_length, 16)
    batch = _two_documents(rows, length).to(device)
    try:
        expected = float(module(batch))
    except (RuntimeError, ValueError, TypeError) as error:  # of the model's own code
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"attention: {attention} does not run in this model here ({reason}); "
            f"{'set training.compile to false' if config.compile else advice}."
        ) from error
    for column, what in (
        (slice(0, length - 8), "the document before it"),
        (slice(length - 2, None), "later tokens"),
    ):
        changed = batch.input_ids.clone()
        changed[:, column] = 3
        found = float(module(dataclasses.replace(batch, input_ids=changed)))
        if not abs(found - expected) <= TOLERANCE * abs(expected):
            raise UserError(
                f"attention: {attention} lets a document see {what} in this model "
                f"(loss {expected:.6f} becomes {found:.6f}); {advice}."
            )


def _two_documents(rows: int, length: int) -> Batch:
    """Sequences of two documents; the second has 8 tokens, of which the first 6 have targets."""
    ids = (5 + torch.arange(rows * length) % 32).view(rows, length)
    labels = ids.roll(-1, 1)
    labels[:, :-8] = labels[:, -2:] = IGNORED
    positions = torch.cat([torch.arange(length - 8), torch.arange(8)])
    return Batch.of(ids, labels, positions.repeat(rows, 1))


def _check_kernel(device: torch.device) -> None:
    """Raises `UserError` if the GPU's kernel and the loop over documents give different results."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(48, heads, 64, generator=generator).bfloat16() for heads in (4, 2, 2)
    )
    cu = torch.tensor([0, 30, 48], dtype=torch.int32)
    for window in (None, 7):
        expected = _by_document(query.float(), key.float(), value.float(), cu, None, window)
        q, k, v = (tensor.to(device) for tensor in (query, key, value))
        found = _by_kernel(q, k, v, cu.to(device), 30, None, window).float().cpu()
        if not torch.allclose(found, expected, atol=0.03, rtol=0.03):
            raise UserError(
                "attention: flash gives wrong numbers on this GPU; set training.attention to sdpa."
            )
