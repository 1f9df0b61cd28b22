"""Keeping packed documents apart in modules that carry a state along the sequence.

Attention is told where documents begin (`training.model.attention`). Recurrent layers and short
convolutions are not, unless their kernels take the boundaries. Two ways are left, which
`training.model.choice` tries in this order:

    boundaries   the decoder gets one row of all sequences and where documents begin in it
                 (`cu_seq_lens_q`, `seq_idx`), for kernels of fla, mamba-ssm and causal-conv1d
    one by one   the module runs on the documents, cut out of the sequences; those of similar length
                 are padded on the right to the longest of them, where nothing causal looks

Either way the rest of the model, the order of the data and the count of tokens stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from cpt_merge.data.packing import Batch
from cpt_merge.training.model.attention import IMPLEMENTATIONS

_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_SHORT = 32  # tokens; documents that differ by fewer are padded to one length


@dataclass(frozen=True)
class Separation:
    """What keeps packed documents apart besides the attention."""

    boundaries: bool = False  # the decoder gets one row, and where documents begin
    one_by_one: tuple[type[nn.Module], ...] = ()  # classes of modules

    def describe(self) -> str:
        """The same in words."""
        if self.boundaries:
            return "the layers are told where they begin"
        if self.one_by_one:
            return f"one by one in {', '.join(kind.__name__ for kind in self.one_by_one)}"
        return "kept apart by the attention"


NOTHING_ELSE = Separation()


def decode(
    decoder: Any, batch: Batch, separation: Separation, documents: PackedDocuments
) -> Tensor:
    """A decoder's hidden states [sequences, length, width] of a batch."""
    ids, positions, names = batch.input_ids, batch.position_ids, {}
    if decoder.config._attn_implementation == IMPLEMENTATIONS["flash"]:
        names = {"cu_seq_lens_q": batch.cu_seqlens, "max_length_q": batch.max_length}
    if separation.boundaries:
        ids, positions = ids.view(1, -1), positions.view(1, -1)
        names = boundary_arguments(batch)
    documents.see(batch)
    hidden = decoder(
        input_ids=ids, position_ids=positions, use_cache=False, **names
    ).last_hidden_state
    return hidden.view(*batch.input_ids.shape, -1)  # type: ignore[no-any-return]


def boundary_arguments(batch: Batch) -> dict[str, Any]:
    """Where documents begin in the flattened batch, as transformers names it for its kernels."""
    lengths = batch.cu_seqlens.diff()
    numbers = torch.arange(len(lengths), dtype=torch.int32, device=lengths.device)
    index = torch.repeat_interleave(numbers, lengths, output_size=batch.input_ids.numel())
    cu, longest = batch.cu_seqlens, batch.max_length
    return dict(zip(_BOUNDARIES, (cu, cu, longest, longest, index.unsqueeze(0)), strict=True))


def group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Documents that are padded to one length: to their longest, by at most a quarter of it."""
    groups: list[list[int]] = []
    shortest = float("inf")
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        if not groups or lengths[number] < shortest:
            groups.append([])
            shortest = min(lengths[number] * 3 / 4, lengths[number] - _SHORT)
        groups[-1].append(number)
    return groups


def padding_share(batches: Iterable[Batch]) -> float:
    """The share of padding in the positions that a module computes one by one for batches."""
    real = computed = 0
    for batch in batches:
        real += sum(batch.lengths)
        groups = group_by_length(batch.lengths)
        computed += sum(len(group) * batch.lengths[group[0]] for group in groups)
    return 1 - real / computed


@dataclass(frozen=True)
class _Group:
    """Documents of similar length in the flattened batch."""

    places: Tensor  # [documents, longest]; padding repeats the last place of its document
    kept: Tensor  # those of places.flatten() that are no padding


class PackedDocuments:
    """The documents of the batch that the model sees; modules that run one by one share it.

    It outlives the forward pass, since recomputation in the backward pass needs it.
    """

    def __init__(self) -> None:
        self.used = False  # whether any module runs one by one
        self._shape = (0, 0)
        self._groups: list[_Group] = []
        self._order: Tensor | None = None

    def see(self, batch: Batch) -> None:
        """Take the documents of a batch."""
        if not self.used:
            return
        self._shape = (batch.input_ids.shape[0], batch.input_ids.shape[1])
        self._groups, self._order = [], None
        if len(batch.lengths) == len(batch.input_ids):  # every sequence is one document
            return
        begins = [0]
        for size in batch.lengths:
            begins.append(begins[-1] + size)
        flat: list[Tensor] = []
        for group in group_by_length(batch.lengths):
            sizes = torch.tensor([batch.lengths[number] for number in group]).unsqueeze(1)
            first = torch.tensor([begins[number] for number in group]).unsqueeze(1)
            steps = torch.arange(int(sizes[0])).unsqueeze(0)
            places = first + torch.minimum(steps, sizes - 1)
            kept = (steps < sizes).flatten().nonzero().squeeze(1)
            flat.append(places.flatten()[kept])
            self._groups.append(_Group(*(_sent(one, batch) for one in (places, kept))))
        self._order = _sent(torch.cat(flat).argsort(), batch)

    def run(
        self, forward: Callable[..., Any], arguments: tuple[Any, ...], names: dict[str, Any]
    ) -> Any:
        """The result of `forward` on the whole batch, from its results on the documents."""
        names = {name: value for name, value in names.items() if name not in _BOUNDARIES}
        if self._order is None:
            return forward(*arguments, **names)
        outputs = [
            forward(
                *(self._cut(value, group) for value in arguments),
                **{name: self._cut(value, group) for name, value in names.items()},
            )
            for group in self._groups
        ]
        return self._joined(outputs)

    def _cut(self, value: Any, group: _Group) -> Any:
        """The part of an argument that belongs to a group: [documents, longest, ...]."""
        if isinstance(value, tuple | list):
            return type(value)(self._cut(one, group) for one in value)
        if isinstance(value, dict):
            return {name: self._cut(one, group) for name, one in value.items()}
        if not isinstance(value, Tensor) or value.ndim < 2:
            return value
        rows, length = self._shape
        if value.shape[0] in (1, rows) and value.shape[1] == length:
            return value.expand(rows, *value.shape[1:]).flatten(0, 1)[group.places]
        if value.ndim == 4 and value.shape[0] in (1, rows) and value.shape[2:] == (length, length):
            row, within = group.places[:, :1] // length, group.places % length
            mask = value.expand(rows, *value.shape[1:])[row[:, 0]]
            heads = torch.arange(mask.shape[1], device=mask.device).view(1, -1, 1, 1)
            documents = torch.arange(len(row), device=mask.device).view(-1, 1, 1, 1)
            cut = mask[documents, heads, within[:, None, :, None], within[:, None, None, :]]
            return _without_padding(cut)
        return value

    def _joined(self, outputs: list[Any]) -> Any:
        """The outputs of all groups, in the order of the batch; only the first of each tuple."""
        if isinstance(outputs[0], tuple):
            rest = (None,) * (
                len(outputs[0]) - 1
            )  # attention weights and states, which nobody reads
            return (self._joined([output[0] for output in outputs]), *rest)
        assert self._order is not None
        parts = [
            output.flatten(0, 1)[group.kept]
            for output, group in zip(outputs, self._groups, strict=True)
        ]
        whole = torch.cat(parts)[self._order]
        return whole.view(*self._shape, *whole.shape[1:])


def _without_padding(mask: Tensor) -> Tensor:
    """A mask [documents, heads, queries, keys] of a causal attention, without what follows a query.

    Padding repeats the last token of a document, which would see it as further copies of itself.
    """
    later = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1)
    hidden = 0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(later, hidden)


def _sent(values: Tensor, batch: Batch) -> Tensor:
    device = batch.input_ids.device
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def run_one_by_one(
    model: nn.Module, kinds: Sequence[type[nn.Module]], documents: PackedDocuments
) -> None:
    """Let the model's modules of these classes see one document at a time.

    Their class changes to a subclass, so that parameters keep their names and copies of the model
    stay independent of it.
    """
    for module in model.modules():
        if type(module) in kinds:
            module.__class__ = _one_by_one(type(module))  # type: ignore[arg-type]
            module.documents = documents  # type: ignore[assignment]
            documents.used = True


def runs_one_by_one(module: nn.Module) -> bool:
    """Whether a module is one of those that see one document at a time."""
    return isinstance(getattr(module, "documents", None), PackedDocuments)


@cache
def _one_by_one(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *arguments: Any, **names: Any) -> Any:
        return self.documents.run(partial(kind.forward, self), arguments, names)

    return type(kind.__name__, (kind,), {"forward": forward, "__doc__": kind.__doc__})
