"""Losses of given tokens, with a part of the logits in memory at a time.

16 windows of 1024 tokens have 4 billion logits in a vocabulary of 256,000: 17 GB in float32. So the
decoder runs once, and the model's own forward pass turns its hidden states into logits in chunks:
it is called with the decoder replaced by the chunk, which keeps whatever a family does after it
(scales, caps, a bias).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpt_merge.checkpoint.text_models import text_decoder

LOGITS_AT_ONCE = 2**26  # 256 MiB in float32
TOKENS_AT_ONCE = 1024  # of a small vocabulary


def token_losses(model: Any, ids: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    """-ln p of the targets in float32, [places]: those of all places where `mask` is 1, by row.

    `ids` and `mask` are [rows, length], `targets` is [places].
    """
    decoder = text_decoder(model)
    if decoder is model or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        return F.cross_entropy(logits.float(), targets, reduction="none")
    outputs: list[Any] = []
    with _with_hook(decoder, outputs):
        model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    output = outputs[0]
    hidden = output.last_hidden_state[mask.bool()]
    vocabulary = model.get_output_embeddings().weight.shape[0]
    size = max(1, min(TOKENS_AT_ONCE, LOGITS_AT_ONCE // vocabulary))
    losses = []
    for part, wanted in zip(torch.split(hidden, size), torch.split(targets, size), strict=True):
        with _replaced(decoder, type(output)(last_hidden_state=part.unsqueeze(0))):
            dummy = torch.zeros((1, len(part)), dtype=torch.long, device=ids.device)
            logits = model(input_ids=dummy, use_cache=False).logits[0]
        losses.append(F.cross_entropy(logits.float(), wanted, reduction="none"))
    return torch.cat(losses)


@contextmanager
def _with_hook(decoder: Any, outputs: list[Any]) -> Iterator[None]:
    handle = decoder.register_forward_hook(lambda *called: outputs.append(called[-1]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _replaced(decoder: Any, output: Any) -> Iterator[None]:
    """Within the block the decoder returns `output`, whatever it is given."""
    own = decoder.__dict__.get("forward")  # accelerate sets one to move tensors between devices
    decoder.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own
