"""Head and cross-entropy in chunks, so that the logits of all tokens never exist at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.packing import IGNORED


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies; its gradients are computed in the forward pass, chunk by chunk.

    For logits z = h W^T, softmax p and one-hot targets y: d loss / dz = p - y, d loss / dh = (p - y) W and
    d loss / dW = sum over tokens of (p - y)^T h. Peak memory: chunk * vocabulary logits, and one gradient of W.
    """

    @staticmethod
    def forward(context: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        for part, target, out in zip(
            torch.split(hidden, chunk), torch.split(labels, chunk), torch.split(hidden_gradient, chunk), strict=True
        ):
            log_probabilities = F.log_softmax((part @ weight.T).float(), dim=-1)
            loss += F.nll_loss(log_probabilities, target, ignore_index=IGNORED, reduction="sum")
            gradient = log_probabilities.exp_()  # p
            kept = (target != IGNORED).unsqueeze(1)
            gradient.scatter_add_(1, target.clamp_min(0).unsqueeze(1), -torch.ones_like(kept, dtype=gradient.dtype))
            gradient = (gradient * kept).to(hidden.dtype)  # p - y, and nothing where there is no target
            out.copy_(gradient @ weight)
            weight_gradient += gradient.T @ part
        context.save_for_backward(hidden_gradient, weight_gradient.to(weight.dtype))
        return loss

    @staticmethod
    def backward(context: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_gradient, weight_gradient = context.saved_tensors
        (scale,) = upstream
        return (
            hidden_gradient * scale.to(hidden_gradient.dtype),
            weight_gradient * scale.to(weight_gradient.dtype),
            None,
            None,
        )


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """Sum over the targets of -ln p(target), in nats.

    `hidden` [tokens, width], `weight` [vocabulary, width], `labels` [tokens] with IGNORED where there is no target;
    `chunk` tokens are taken at a time.
    """
    if torch.is_grad_enabled():
        return _ChunkedCrossEntropy.apply(hidden, weight, labels, chunk)  # type: ignore[no-any-return, no-untyped-call]
    parts = zip(torch.split(hidden, chunk), torch.split(labels, chunk), strict=True)
    losses = [F.cross_entropy((h @ weight.T).float(), y, ignore_index=IGNORED, reduction="sum") for h, y in parts]
    return torch.stack(losses).sum()
