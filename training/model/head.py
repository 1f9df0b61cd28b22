"""What a model does between its decoder and its logits, found by measuring it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from cpt_merge.checkpoint.text_models import text_decoder
from cpt_merge.core.errors import UserError

_TOKENS, _ROWS = 4, 32  # of the probe


@dataclass(frozen=True)
class HeadForm:
    """Scale and cap of the logits, as in `training.model.loss.Head`."""

    scale: float = 1.0
    softcap: float | None = None


class _Hidden(BaseModelOutputWithPast):  # type: ignore[misc]
    """A decoder's output that has only the hidden states."""

    def __getattr__(self, name: str) -> None:
        return None


def find_head_form(model: Any) -> HeadForm:
    """How a model computes logits from hidden states; its parameters may be on the meta device.

    Families name the scale differently (`logit_scale`, `logits_scaling`, `lm_head_multiplier`), and
    some divide by it. So the scale is measured: the model's own forward pass runs with a given
    hidden state in place of its decoder and a small matrix in place of its head, and the result
    must match the formula. Raises `UserError` for a model with another kind of head.
    """
    name, head = type(model).__name__, model.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), Tensor) or head.weight.ndim != 2:
        raise UserError(f"{name} has no output head of one matrix; such models cannot be trained.")
    softcap = getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, _TOKENS, head.weight.shape[1], generator=generator, dtype=torch.float64)
    matrix = torch.randn(_ROWS, head.weight.shape[1], generator=generator, dtype=torch.float64)
    matrix /= head.weight.shape[1] ** 0.5  # logits of about 1, below any cap
    plain = hidden @ matrix.T
    try:
        with (
            torch.no_grad(),
            _without_embeddings(model),
            _replaced(text_decoder(model), _Hidden(last_hidden_state=hidden)),
            _multiplying(head, matrix),
        ):
            logits = model(
                input_ids=torch.zeros(1, _TOKENS, dtype=torch.long), use_cache=False
            ).logits
        digits = 12 if logits.dtype == torch.float64 else 7  # some models return float32
        logits = logits.double()
        bare = logits if softcap is None else softcap * torch.atanh(logits / softcap)
        form = HeadForm(
            float(f"{float((bare * plain).sum() / plain.square().sum()):.{digits}g}"), softcap
        )
        if not torch.allclose(bare, form.scale * plain, rtol=1e-4, atol=1e-5 * abs(form.scale)):
            raise ValueError(
                "its logits are not scale * (h W + b), or that capped by final_logit_softcapping"
            )
    except (
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        NotImplementedError,
        KeyError,
    ) as error:
        given, needed = _hidden_size(model), head.weight.shape[1]
        reason = (
            str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        )
        if given != needed:
            reason = f"its decoder makes {given} numbers of a token and its head takes {needed}"
        raise UserError(
            f"{name} makes its logits in its own way ({reason}); such models cannot be trained."
        ) from None
    return form


def _hidden_size(model: Any) -> int | None:
    return getattr(text_decoder(model).config, "hidden_size", None)


@contextmanager
def _replaced(module: nn.Module, output: Any) -> Iterator[None]:
    """Within the block a module returns `output`, whatever it is given."""
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward


@contextmanager
def _without_embeddings(model: nn.Module) -> Iterator[None]:
    """Within the block all embeddings are zeros that take no memory.

    A wrapper may look at them on its way to the decoder.
    """
    parts = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    weights = [part.weight for part in parts]
    for part in parts:
        part.weight = _zeros_like(part.weight)
    try:
        yield
    finally:
        for part, weight in zip(parts, weights, strict=True):
            part.weight = weight


@contextmanager
def _multiplying(head: Any, matrix: Tensor) -> Iterator[None]:
    """Within the block a head multiplies by `matrix`, whose type a model may look at first."""
    weight, head.weight = head.weight, _zeros_like(head.weight)
    head.forward = lambda hidden: hidden @ matrix.T
    try:
        yield
    finally:
        del head.forward
        head.weight = weight


def _zeros_like(weight: Tensor) -> nn.Parameter:
    """Zeros of the probe's type that take no memory."""
    zeros = torch.zeros((), dtype=torch.float64).expand(weight.shape)
    return nn.Parameter(zeros, requires_grad=False)
