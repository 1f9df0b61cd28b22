"""Routers of experts: their auxiliary loss, and how evenly they use the experts.

The auxiliary loss is that of Switch Transformers (https://arxiv.org/abs/2101.03961, equations 4 to
6), as transformers adds it: over E experts of which each token takes k,

    loss = E * sum over experts e of  f_e * p_e

f_e is the number of times that e was taken, and p_e the sum of its probabilities, both divided by
the number of tokens, over all layers and all tokens of one micro-batch. It is k if all experts are
used alike. Its weight is the coefficient of config.json.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils.output_capturing import OutputRecorder

from cpt_merge.checkpoint.tensor_kinds import is_routed, kind_of, layer_of
from cpt_merge.checkpoint.text_models import text_decoder
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import counted, say
from cpt_merge.training.flops import experts

_TOKENS = 8  # of the probe


@dataclass(frozen=True)
class AuxiliaryLoss:
    """What a model adds to its loss: `coefficient` times the loss above with k = `taken`."""

    coefficient: float
    taken: int


@dataclass(frozen=True)
class Routing:
    """What one router did: logits [tokens, experts], and the experts [tokens, k] that were taken.

    Some routers do not say which experts were taken.
    """

    logits: Tensor
    taken: Tensor | None


class Routers:
    """The routers of a decoder. They are heard only within `recording`, not when recomputed."""

    def __init__(self, decoder: nn.Module) -> None:
        self._heard: list[Routing] | None = None
        recorded = (getattr(decoder, "_can_record_outputs", None) or {}).get("router_logits", [])
        specs = [
            spec if isinstance(spec, OutputRecorder) else OutputRecorder(spec, index=1)
            for spec in (recorded if isinstance(recorded, list) else [recorded])
        ]
        self.modules = [
            (module, spec.index)
            for name, module in decoder.named_modules()
            for spec in specs
            if isinstance(module, spec.target_class) and (spec.layer_name or "") in name
        ]
        self._logits_at = {type(module): index for module, index in self.modules}
        for module, _ in self.modules:
            module.register_forward_hook(self._hear)

    def _hear(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if self._heard is None:
            return
        parts = outputs if isinstance(outputs, tuple) else (outputs,)
        logits = parts[self._logits_at[type(module)]]
        if logits is not None:
            flat = logits.reshape(-1, logits.shape[-1])
            self._heard.append(Routing(flat, _indices(parts, len(flat))))

    @contextmanager
    def recording(self) -> Iterator[list[Routing]]:
        """What the routers do within the block."""
        heard: list[Routing] = []
        self._heard = heard
        try:
            yield heard
        finally:
            self._heard = None


def _indices(parts: Sequence[Any], tokens: int) -> Tensor | None:
    """The experts of each token among a router's outputs, [tokens, k]; None if they are not."""
    for part in parts:
        if isinstance(part, Tensor) and not part.is_floating_point() and part.ndim > 1:
            flat = part.reshape(-1, part.shape[-1])
            if len(flat) == tokens:
                return flat
    return None


def auxiliary_loss(logits: Sequence[Tensor], taken: int) -> Tensor:
    """The loss without its coefficient, of the logits [tokens, experts] of each layer."""
    device, count = logits[0].device, logits[0].shape[-1]
    probabilities = torch.zeros(count, device=device)
    times = torch.zeros(count, device=device)
    for of_layer in logits:
        of_tokens = F.softmax(of_layer.to(device), dim=-1)
        probabilities = probabilities + of_tokens.float().sum(0)
        times += _times_taken(of_tokens.topk(taken, dim=-1).indices, count)
    tokens = sum(len(of_layer) for of_layer in logits)
    return count * ((times / tokens) * (probabilities / tokens)).sum()


def _times_taken(taken: Tensor, count: int) -> Tensor:
    """How often each of `count` experts is among the indices, float32."""
    times = torch.zeros(count, device=taken.device)
    return times.scatter_add_(
        0, taken.reshape(-1), torch.ones_like(taken, dtype=times.dtype).view(-1)
    )


@torch.no_grad()
def statistics(heard: Sequence[Routing]) -> Tensor:
    """(entropy, share): means over the layers.

    entropy: of the probabilities of a token's experts, divided by its largest value, ln E; the mean
    over tokens. share: the part of all choices that goes to the expert that is chosen most; 1 / E
    if all are used alike, and not a number if the routers do not say what they chose.
    """
    entropies, shares = [], []
    for routing in heard:
        count = routing.logits.shape[-1]
        logs = F.log_softmax(routing.logits.float(), dim=-1)
        entropies.append(-(logs.exp() * logs).sum(-1).mean() / math.log(count))
        if routing.taken is not None:
            times = _times_taken(routing.taken, count)
            shares.append(times.max() / times.sum())
    share = torch.stack(shares).mean() if shares else torch.tensor(math.nan, device=logs.device)
    return torch.stack([torch.stack(entropies).mean(), share])


def choose_matmuls(model: Any, itemsize: int) -> None:
    """Multiply experts one by one, with a line, if their sizes do not fit torch's grouped matmul.

    It needs rows of whole 16 bytes, which transformers does not check. `itemsize` is that of the
    compute type.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "_experts_implementation", None) != "grouped_mm":
        return
    for name, parameter in model.named_parameters():
        odd = [length for length in parameter.shape[1:] if length * itemsize % 16]
        if kind_of(name) == "experts" and parameter.ndim == 3 and odd:
            model.set_experts_implementation("eager")
            say(
                f"model: experts are multiplied one by one, because grouped matmuls need "
                f"multiples of {16 // itemsize} and {name} has {odd[0]}"
            )
            return


def describe_experts(model: Any, auxiliary: AuxiliaryLoss | None) -> dict[str, str]:
    """A line of the startup summary; none for a dense model."""
    config = model.config.get_text_config(decoder=True)
    # a layer may have several routers (JetMoe), or a table in place of one (DeepSeek-V4)
    layers = {layer_of(name) for name, _ in model.named_parameters() if is_routed(name)}
    if not layers:
        return {}
    implementation = getattr(config, "_experts_implementation", None) or "eager"
    loss = f"auxiliary loss * {auxiliary.coefficient:g}" if auxiliary else "no auxiliary loss"
    return {
        "experts": f"{experts(config)} in {counted(len(layers), 'layer')}, "
        f"multiplied by {implementation}; {loss}"
    }


def find_auxiliary_loss(model: Any) -> AuxiliaryLoss | None:
    """What a model's own forward pass adds to its loss; its parameters may be on the meta device.

    Families name the coefficient and k differently, so both are measured: the forward pass runs
    with known router logits in place of its decoder. None if it adds nothing. Raises `UserError`
    for another loss than that above.
    """
    count = experts(model.config.get_text_config(decoder=True))
    if not count:
        return None
    generator = torch.Generator().manual_seed(0)
    logits = tuple(torch.randn(_TOKENS, count, generator=generator) for _ in range(2))
    with torch.no_grad(), _probed(model, logits):
        try:
            output = model(
                input_ids=torch.zeros(1, _TOKENS, dtype=torch.long), use_cache=False,
                labels=torch.zeros(1, _TOKENS, dtype=torch.long), output_router_logits=True,
            )  # fmt: skip
        except TypeError:  # it knows no router logits
            return None
    found, loss = getattr(output, "aux_loss", None), getattr(output, "loss", None)
    if not isinstance(found, Tensor) or not isinstance(loss, Tensor):
        return None
    for taken in range(1, count + 1):
        if torch.allclose(auxiliary_loss(logits, taken), found, rtol=1e-5):
            coefficient = float(f"{float(loss / found):.6g}")
            return AuxiliaryLoss(coefficient, taken) if coefficient else None
    raise UserError(
        f"{type(model).__name__} has an auxiliary loss of its own kind for its routers; set "
        "training.auxiliary_loss to false to train without it."
    )


@contextmanager
def _probed(model: Any, logits: tuple[Tensor, ...]) -> Iterator[None]:
    """Within the block the decoder returns these router logits, and all else of the loss is 0."""
    decoder, head = text_decoder(model), model.get_output_embeddings()
    hidden = torch.zeros(1, _TOKENS, head.weight.shape[1])
    before = model.__dict__.get("_loss_function")

    def answer(*_: Any, **__: Any) -> Any:
        return MoeModelOutputWithPast(last_hidden_state=hidden, router_logits=logits)

    def no_logits(hidden: Tensor) -> Tensor:
        return hidden[..., :1]

    def no_loss(*_: Any, **__: Any) -> Tensor:
        return torch.zeros(())

    decoder.forward, head.forward, model.loss_function = answer, no_logits, no_loss
    try:
        yield
    finally:
        del decoder.forward, head.forward, model._loss_function
        if before is not None:
            model._loss_function = before
