"""Head and cross-entropy in chunks, so that the logits of all tokens never exist at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpt_merge.data.packing import IGNORED


@dataclass(frozen=True)
class Head:
    """How a hidden state h becomes logits: z = softcap * tanh(scale * (h W^T + b) / softcap).

    Without `softcap`, z = scale * (h W^T + b). Rows 0 .. frozen_rows - 1 of W and b get no
    gradient.
    """

    weight: Tensor  # [vocabulary, width]
    bias: Tensor | None = None  # [vocabulary]
    scale: float = 1.0
    softcap: float | None = None
    frozen_rows: int = 0

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [tokens, vocabulary] of `hidden` [tokens, width]."""
        return self._finish(_matmul(hidden, self.weight.T))

    def _finish(self, logits: Tensor) -> Tensor:
        """From h W^T to z, in place."""
        if self.bias is not None:
            logits += self.bias
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def cross_entropy_sum(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    chunk: int,
    compiled: bool = False,
    weights: Tensor | None = None,
) -> Tensor:
    """Sum over the targets of -ln p(target), in nats, float32.

    `hidden` is [tokens, width], `labels` [tokens] with IGNORED where there is no target. `chunk`
    tokens are computed at a time. The result can be differentiated once. With `compiled`,
    torch.compile handles what is between the matmuls of training. `weights` [tokens], float32, are
    constant factors of the terms.
    """
    if torch.is_grad_enabled():
        total: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, head, labels, chunk, compiled, weights
        )
        return total
    if weights is not None:
        return (cross_entropies(hidden, head, labels, chunk) * weights).sum()
    parts = zip(torch.split(hidden, chunk), torch.split(labels, chunk), strict=True)
    losses = [
        F.cross_entropy(head.logits(h), y, ignore_index=IGNORED, reduction="sum") for h, y in parts
    ]
    return torch.stack(losses).sum()


@torch.no_grad()
def cross_entropies(hidden: Tensor, head: Head, labels: Tensor, chunk: int) -> Tensor:
    """-ln p(target) of every token [tokens], in nats, float32; 0 where there is no target."""
    parts = zip(torch.split(hidden, chunk), torch.split(labels, chunk), strict=True)
    losses = [
        F.cross_entropy(head.logits(h), y, ignore_index=IGNORED, reduction="none") for h, y in parts
    ]
    return torch.cat(losses)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies; its gradients are computed in the forward pass, chunk by chunk.

    With a = h W^T + b, logits z, softmax p and one-hot targets y:

        g = d loss / da = (p - y) * scale * (1 - (z / softcap)^2)
        d loss / dh = g W    d loss / dW = sum over tokens of g^T h    d loss / db = sum of g

    Peak memory: a chunk of logits in float32, one in the type of the matmuls if that is another,
    and the float32 gradient of W.
    """

    @staticmethod
    def forward(
        context: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        labels: Tensor,
        chunk: int,
        compiled: bool,
        weights: Tensor | None,
    ) -> Tensor:
        """The loss. All gradients are computed here and kept, for an upstream gradient of 1."""
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.empty_like(weight, dtype=_accumulator(weight))
        weight_gradient[: head.frozen_rows] = 0.0
        bias_gradient = None if bias is None else torch.zeros_like(bias, dtype=_accumulator(weight))
        trained = slice(head.frozen_rows, None)
        between = _compiled_loss_and_gradient if compiled else _loss_and_gradient
        factors = (labels != IGNORED).to(_accumulator(hidden))
        if weights is not None:
            factors *= weights
        parts = (
            torch.split(tensor, chunk) for tensor in (hidden, labels, factors, hidden_gradient)
        )
        for number, (part, target, factor, out) in enumerate(zip(*parts, strict=True)):
            nats, gradient = between(head.logits(part), target, factor, head, hidden.dtype)
            loss += nats
            if bias_gradient is not None:
                bias_gradient[trained] += gradient[:, trained].sum(0)
            torch.mm(gradient, weight, out=out)
            _add_matmul(weight_gradient[trained], gradient[:, trained].T, part, first=number == 0)
            del gradient  # before the logits of the next chunk are made
        context.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        context.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(context: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # in place: a second backward pass would see changed tensors, which autograd refuses
        hidden, weight, bias = context.saved_tensors
        for gradient in (hidden, weight) if bias is None else (hidden, weight, bias):
            gradient.mul_(upstream[0])
        return (
            hidden,
            weight.to(context.dtype),
            None if bias is None else bias.to(context.dtype),
            None,
            None,
            None,
            None,
            None,
        )


def _loss_and_gradient(
    logits: Tensor, target: Tensor, factor: Tensor, head: Head, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(sum of -ln p(target) times `factor`, its gradient by h W^T + b in `dtype`).

    Overwrites `logits`. `factor` [tokens] is 0 where there is no target.
    """
    slope = None if head.softcap is None else 1 - (logits / head.softcap).square_()
    kept = factor.unsqueeze(1)
    place = target.clamp_min(0).unsqueeze(1)
    largest = logits.amax(1, keepdim=True)
    at_target = logits.gather(1, place) - largest
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    nats = ((total.log() - at_target) * kept).sum()
    gradient = logits.mul_(kept * head.scale / total)  # p, and nothing where there is no target
    gradient.scatter_add_(1, place, -kept * head.scale)  # p - y
    return nats, (gradient if slope is None else gradient.mul_(slope)).to(dtype)


@torch.compile(fullgraph=True)
def _compiled_loss_and_gradient(
    logits: Tensor, target: Tensor, factor: Tensor, head: Head, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The same to be compiled: it reads the logits twice and writes the gradient once.

    The other form reads and writes all logits in every operation; this one, if it were not
    compiled, would hold several tensors of their size.
    """
    place = target.clamp_min(0)
    log_total = torch.logsumexp(logits, 1)
    nats = ((log_total - logits.gather(1, place.unsqueeze(1)).squeeze(1)) * factor).sum()
    hot = torch.arange(logits.shape[1], device=logits.device).unsqueeze(0) == place.unsqueeze(1)
    gradient = (torch.exp(logits - log_total.unsqueeze(1)) - hot.to(logits.dtype)) * (
        factor * head.scale
    ).unsqueeze(1)
    if head.softcap is not None:
        gradient = gradient * (1 - (logits / head.softcap).square())
    return nats, gradient.to(dtype)


def _accumulator(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32 or wider; on a GPU without rounding a bfloat16 product in between."""
    wide = _accumulator(a)
    if a.dtype != wide and a.is_cuda:
        return torch.mm(a, b, out_dtype=wide)
    return torch.mm(a, b).to(wide)


def _add_matmul(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a b; total = a b for the first chunk, whatever `total` held before."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(torch.mm(a, b) if not a.is_cuda else _matmul(a, b))
    else:
        total += _matmul(a, b)
