"""Which attention a model uses, and what else keeps its packed documents apart: found by trying.

A small model of the same architecture (`training.model.small`) runs on packed documents. Nothing
outside the first tokens of a document may change their hidden states, or receive a gradient from
them. The attentions are tried from the fastest to the slowest, and for each of them what
`training.model.documents` offers. The start of training checks the result on the model itself
(`training.model.attention.check_attention`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cpt_merge.checkpoint.text_models import text_decoder
from cpt_merge.core.errors import UserError
from cpt_merge.data.packing import Batch
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.model.attention import (
    AUTOMATIC,
    IMPLEMENTATIONS,
    check_device,
    check_supported,
)
from cpt_merge.training.model.documents import (
    NOTHING_ELSE,
    PackedDocuments,
    Separation,
    decode,
    run_one_by_one,
)
from cpt_merge.training.model.small import TOKENS, small_config, small_decoder

_LENGTHS = (7, 8, 9)  # documents of each of two sequences
_BEGIN, _END = TOKENS + 7, TOKENS + 7 + 6  # places in the batch that nothing else may change
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of the largest hidden state


@dataclass(frozen=True)
class Choice:
    """How the documents of a model are kept apart."""

    attention: str  # the recipe's name
    separation: Separation = NOTHING_ELSE
    passed_over: tuple[str, ...] = ()  # what is wrong with each faster attention
    tried: bool = True  # False: no small model runs, so only the start of training shows a leak

    def describe(self) -> list[str]:
        """Lines for whoever checks a recipe; none for what everybody expects."""
        lines = []
        if self.passed_over:
            lines.append(f"attention: {self.attention}, since {', and '.join(self.passed_over)}")
        if self.separation != NOTHING_ELSE:
            lines.append(f"packed documents: {self.separation.describe()}")
        if not self.tried:
            lines.append(
                f"whether attention {self.attention!r} keeps packed documents apart is checked "
                "when training starts: no small model of this kind can be tried"
            )
        return lines


def choose(
    build: Callable[[str], Any], config: TrainingConfig, device: torch.device
) -> tuple[Any, Choice]:
    """A model, which `build` makes with an attention of the recipe's name, and what was chosen.

    Raises `UserError` if the attention that the recipe insists on does not fit, or none does.
    """
    automatic = config.attention == "auto"
    names = [name for name in AUTOMATIC if name != "flex" or device.type == "cuda"]
    over: list[str] = []
    model = None
    for name in names if automatic else [config.attention]:
        try:
            if automatic:
                check_device(name, config.precision, device)
            model = build(name)
            check_supported(model, name)
            separation = _try(model, name, config.sequence_length, device)
            if name == "flex":
                torch.compiler.reset()  # what was compiled for the small model's shapes
        except UserError as error:
            if not automatic:
                raise
            over.append(str(error).removeprefix("attention: ").split("; set")[0])
            continue
        return model, Choice(name, separation or NOTHING_ELSE, tuple(over), separation is not None)
    if model is None:  # it cannot be built for a reason that no attention changes
        build(names[-1])
    raise UserError(
        "this model cannot be trained on packed documents: "
        f"{', and '.join(over)}; use another base."
    )


def _try(
    model: Any, attention: str, sequence_length: int, device: torch.device
) -> Separation | None:
    """What else keeps documents apart with an attention; None if no small model can be tried.

    Raises `UserError` if nothing does.
    """
    runs = attention != "flex" or device.type == "cuda"
    config = small_config(text_decoder(model), sequence_length) if runs else None
    if config is None:
        return None

    def small() -> Any:
        half = device.type == "cuda" and attention == "flash"  # whose kernel computes in bf16
        found = small_decoder(config, IMPLEMENTATIONS[attention])
        return found.to(device, torch.bfloat16 if half else torch.float32)

    found = first = _Trial(small(), NOTHING_ELSE).leak()
    kinds: tuple[type[nn.Module], ...] = ()
    if found is None:
        return NOTHING_ELSE
    if _Trial(small(), Separation(boundaries=True)).leak() is None:
        return Separation(boundaries=True)
    while culprit := _Trial(small(), Separation(one_by_one=kinds)).culprit():
        kinds = (*kinds, culprit)
        if (found := _Trial(small(), Separation(one_by_one=kinds)).leak()) is None:
            return Separation(one_by_one=kinds)
    raise UserError(
        f"attention: {attention} {first} in this model"
        + (f", and one by one in {kinds[-1].__name__} it {found}" if kinds else "")
        + "; set another training.attention."
    )


class _Trial:
    """A small decoder on two sequences of three documents each."""

    def __init__(self, decoder: Any, separation: Separation) -> None:
        self.decoder, self.separation = decoder, separation
        self.documents = PackedDocuments()
        run_one_by_one(decoder, separation.one_by_one, self.documents)
        positions = torch.cat([torch.arange(length) for length in _LENGTHS]).repeat(2, 1)
        ids = 5 + torch.arange(2 * TOKENS).view(2, TOKENS) % 32
        self.batch = Batch.of(ids, ids, positions).to(next(decoder.parameters()).device)

    def leak(self) -> str | None:
        """What reaches the places from _BEGIN to _END that must not, and what else is wrong."""
        try:
            found, gradient = self._with_gradient()
            for places, what in (
                (slice(0, _BEGIN), "the document before it"),
                (slice(_END, None), "later tokens"),
            ):
                reached = gradient[places].max() > 1e-6 * gradient.max()
                if reached or self._differs(found, self._run(self._changed(places))):
                    return f"lets a document see {what}"
            if self._differs(self._packed(), self._alone()):
                return "gives a document other values than it has alone"
        except UserError:
            raise
        except Exception as error:  # of the family's own code or its kernels: any kind
            return f"does not run on packed documents ({_first_line(error)})"
        return None

    def culprit(self) -> type[nn.Module] | None:
        """The class of the first part of a layer through which other documents reach the places.

        None if there is none that does not run one by one already.
        """
        calls: list[list[_Call]] = [[], []]
        for record, ids in zip(
            calls, (self.batch.input_ids, self._changed(slice(0, _BEGIN))), strict=True
        ):
            with _recorded(self.decoder, record):
                try:
                    self._run(ids)
                except UserError:
                    raise
                except Exception:  # the part that raised it does not take packed documents
                    unfinished = [call for call in record if call.output is None]
                    return self._new(unfinished[-1]) if unfinished else None
        for before, after in zip(*calls, strict=True):
            same = all(
                not self._differs(_places(one), _places(other))
                for one, other in zip(before.inputs, after.inputs, strict=True)
            )
            if same and self._differs(_places(before.output), _places(after.output)):
                return self._new(before)
        return None

    def _new(self, call: _Call) -> type[nn.Module] | None:
        kind = type(call.module)
        separate = {one.__name__ for one in self.separation.one_by_one}
        return None if kind.__name__ in separate else kind

    def _changed(self, places: slice) -> Tensor:
        ids = self.batch.input_ids.clone()
        ids.view(-1)[places] = 3
        return ids

    def _run(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            batch = dataclasses.replace(self.batch, input_ids=ids)
            return _places(decode(self.decoder, batch, self.separation, self.documents))

    @torch.no_grad()
    def _packed(self) -> Tensor:
        """The hidden states of the document that begins at the places."""
        hidden = decode(self.decoder, self.batch, self.separation, self.documents)
        return hidden.flatten(0, 1)[_BEGIN : _BEGIN + _LENGTHS[1]]

    @torch.no_grad()
    def _alone(self) -> Tensor:
        """The same when it is all there is."""
        ids = self.batch.input_ids.view(1, -1)[:, _BEGIN : _BEGIN + _LENGTHS[1]]
        positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        batch = Batch.of(ids.cpu(), ids.cpu(), positions.cpu()).to(ids.device)
        return decode(self.decoder, batch, self.separation, self.documents)[0]

    @torch.enable_grad()
    def _with_gradient(self) -> tuple[Tensor, Tensor]:
        """The hidden states of the places, and how much each place's embedding counts for them."""
        embedded: list[Tensor] = []
        hook = self.decoder.get_input_embeddings().register_forward_hook(
            lambda _module, _inputs, output: embedded.append(output)
        )
        hidden = _places(decode(self.decoder, self.batch, self.separation, self.documents))
        hook.remove()
        weights = torch.linspace(-1, 1, hidden.numel(), device=hidden.device).view_as(hidden)
        (gradient,) = torch.autograd.grad((hidden * weights).sum(), embedded[:1])
        return hidden.detach(), gradient.flatten(0, 1).float().abs().amax(-1)

    def _differs(self, one: Tensor, other: Tensor) -> bool:
        tolerance = _TOLERANCE.get(one.dtype, 0.0)
        return not bool((one - other).abs().max() <= tolerance * one.abs().max())


@dataclass
class _Call:
    """A call of a part of a layer; `output` is None until it returns."""

    module: nn.Module
    inputs: list[Tensor]
    output: Tensor | None = None


@contextmanager
def _recorded(decoder: Any, calls: list[_Call]) -> Iterator[None]:
    """Within the block, note the calls of the layers' parts that work on whole sequences."""
    layers = [
        layer for part in decoder.modules() if isinstance(part, nn.ModuleList) for layer in part
    ]

    def before(module: nn.Module, arguments: tuple[Any, ...], names: dict[str, Any]) -> None:
        given = [value for value in (*arguments, *names.values()) if _is_sequences(value)]
        calls.append(_Call(module, given))

    def after(module: nn.Module, _arguments: Any, output: Any) -> None:
        call = next(call for call in reversed(calls) if call.module is module)
        first = output[0] if isinstance(output, tuple) else output
        call.output = first if _is_sequences(first) else torch.zeros(1, 2 * TOKENS, 1)

    parts = {part for layer in layers for part in layer.children()}
    hooks = [part.register_forward_pre_hook(before, with_kwargs=True) for part in parts]
    hooks += [part.register_forward_hook(after) for part in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_sequences(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == (2, TOKENS)


def _places(values: Tensor | None) -> Tensor:
    assert values is not None
    return values.flatten(0, 1)[_BEGIN:_END]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
