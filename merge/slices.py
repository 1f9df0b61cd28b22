"""Merge any slice of any tensor. Files, shards and models share this, so their bytes are equal.

The caller gives float32 values of the CPT model. The slice's part of each vector is read here, by
token for the matrices of the vocabulary. Everything is computed in chunks that fit in a core's
cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from types import EllipsisType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cpt_merge.checkpoint.dtypes import FLOATS, Array, Float32, is_finite, rounded
from cpt_merge.checkpoint.headers import TensorInfo
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.errors import UserError
from cpt_merge.merge import formula, norms
from cpt_merge.merge.methods.combine import Place, TensorRange, combine
from cpt_merge.merge.methods.gate import gate, movement
from cpt_merge.merge.methods.slerp import Products
from cpt_merge.merge.methods.ties import magnitude_threshold
from cpt_merge.merge.norms import Sums
from cpt_merge.merge.plan import MergePlan, PlannedTensor, PlannedVector
from cpt_merge.merge.rows import Role, RowAlignment
from cpt_merge.merge.rules import Treatment
from cpt_merge.merge.vectors import Difference, RowPairs, mean_rows

STEP = 1 << 18  # elements that are read at a time to find a threshold
CHUNK = 1 << 18  # elements: one megabyte in float32. Half of it costs 30 % more processor time

ReadCpt = Callable[[int, int], Float32]


class SliceOutput(Protocol):
    """Where merged slices go: the files of a checkpoint, or memory. Called from several threads."""

    def write_flat(self, name: str, start: int, values: Array) -> None:
        """Take elements from `start` on, in storage order and in the type of the plan."""


class NoOutput:
    """For looking at whole tensors before anything is merged."""

    def write_flat(self, name: str, start: int, values: Array) -> None:
        """Never called."""
        raise NotImplementedError(name)


@dataclass(frozen=True)
class Part:
    """A vector's part in some elements; `shared` selects the rows that base and chat both have."""

    difference: Difference
    shared: EllipsisType | NDArray[np.bool_] = ...

    @property
    def values(self) -> Float32:
        """chat - base."""
        return self.difference.values

    @property
    def base(self) -> Float32 | None:
        """The base's elements, where it is known."""
        return self.difference.base


class SliceMerger:
    """Merges slices into an output. Safe to use from several threads.

    `ranges` has those tensors of which something must be known as a whole.
    """

    def __init__(
        self, plan: MergePlan, output: SliceOutput, ranges: dict[str, TensorRange]
    ) -> None:
        self.plan, self.output, self.ranges = plan, output, ranges
        self._mean_row = cache(plan.cpt.mean_row)

    def merge(self, tensor: PlannedTensor, start: int, stop: int, read_cpt: ReadCpt) -> list[Sums]:
        """Merge elements [start, stop) and write them; `read_cpt` gives CPT's elements in float32.

        A slice of a vocabulary matrix consists of whole rows. Returns the sums of each vector.
        Raises `UserError` for NaN or Inf.
        """
        sums = [Sums() for _ in self.plan.vectors]
        for first, last in self._chunks(tensor, start, stop):
            cpt = self._read_cpt(tensor, first, last, read_cpt)
            merged = self._merge_chunk(tensor, first, cpt, sums)
            try:
                stored = rounded(merged, tensor.spec.dtype, tensor.name)
            except UserError:
                self._check_models(tensor, cpt)
                raise
            self.output.write_flat(tensor.name, first, stored)
        return sums

    def gate_range(
        self, tensor: PlannedTensor, start: int, stop: int, read_cpt: ReadCpt
    ) -> tuple[float, float]:
        """The least and the greatest |cpt - base| of [start, stop); (inf, -inf) without a base."""
        low, high, vector = math.inf, -math.inf, self.plan.chat
        for first, last in self._chunks(tensor, start, stop):
            cpt = self._read_cpt(tensor, first, last, read_cpt)
            if tensor.by_token:
                here = slice(first // self._width(tensor), last // self._width(tensor))
                shared = vector.rows.role[here] == Role.SHARED
                cpt = cpt.reshape(len(shared), -1)[shared]
                part = self._rows(tensor, vector, here, shared)
            else:
                part = Part(vector.source.elements(tensor.name, first, last))
            if cpt.size and part.base is not None:
                change = movement(cpt, part.base)
                low, high = min(low, float(change.min())), max(high, float(change.max()))
        return low, high

    def products(self, tensor: PlannedTensor, read_cpt: ReadCpt) -> Products:
        """What slerp must know of a whole tensor; of a vocabulary's, of the rows that both have."""
        found, source, rows = Products(), self.plan.chat.source, self.plan.chat.rows
        for first, last in self._chunks(tensor, 0, tensor.size):
            cpt = self._read_cpt(tensor, first, last, read_cpt)
            if not tensor.by_token:
                found.count(cpt, source.chat_elements(tensor.name, first, last))
                continue
            here = slice(first // self._width(tensor), last // self._width(tensor))
            shared = rows.role[here] == Role.SHARED
            chat = source.chat_rows(tensor.name, rows.chat[here][shared])
            found.count(cpt.reshape(len(shared), -1)[shared], chat)
        return found

    def _chunks(self, tensor: PlannedTensor, start: int, stop: int) -> Iterator[tuple[int, int]]:
        width = self._width(tensor)
        step = max(CHUNK // width, 1) * width if tensor.by_token else CHUNK
        for first in range(start, stop, step):
            yield first, min(first + step, stop)

    def _width(self, tensor: PlannedTensor) -> int:
        return math.prod(tensor.spec.shape[1:])

    def _read_cpt(self, tensor: PlannedTensor, first: int, last: int, read_cpt: ReadCpt) -> Float32:
        """CPT's elements; rows that CPT does not have are the mean of its rows."""
        known = self.plan.cpt.tensors[tensor.name].size
        if last <= known:
            return read_cpt(first, last)
        missing = (last - max(first, known)) // self._width(tensor)
        parts = [read_cpt(first, known)] if first < known else []
        values: Float32 = np.concatenate([*parts, np.tile(self._mean_row(tensor.name), missing)])
        return values

    def _merge_chunk(
        self, tensor: PlannedTensor, first: int, cpt: Float32, sums: list[Sums]
    ) -> Float32:
        if tensor.by_token:
            return self._merge_rows(
                tensor, first, cpt.reshape(-1, self._width(tensor)), sums
            ).reshape(-1)
        if _treatment(tensor).action == "skip":
            return cpt
        name, last = tensor.name, first + cpt.size
        parts = [Part(vector.source.elements(name, first, last)) for vector in self.plan.vectors]
        chat = partial(self.plan.chat.source.chat_elements, name, first, last)
        return self._combine(tensor, Place(name, first, cpt.size), cpt, parts, chat, sums)

    def _merge_rows(
        self, tensor: PlannedTensor, first: int, cpt: Float32, sums: list[Sums]
    ) -> Float32:
        """Rows of a vocabulary matrix from element `first` on, each treated by its role."""
        name, source, alignment = tensor.name, self.plan.chat.source, self.plan.chat.rows
        here = slice(first // cpt.shape[1], first // cpt.shape[1] + len(cpt))
        transplanted = alignment.role[here] == Role.CHAT
        moved = self._moved_rows(_treatment(tensor), here) & ~transplanted
        merged = cpt.copy()
        if moved.any():
            parts = [self._rows(tensor, vector, here, moved) for vector in self.plan.vectors]
            chat = partial(source.chat_rows, name, alignment.chat[here][moved])
            place = Place(name, first, cpt.size, moved)
            merged[moved] = self._combine(tensor, place, cpt[moved], parts, chat, sums)
        if transplanted.any():
            merged[transplanted] = source.chat_rows(name, alignment.chat[here][transplanted])
        return merged

    def _combine(
        self,
        tensor: PlannedTensor,
        place: Place,
        cpt: Float32,
        parts: list[Part],
        chat: Callable[[], Float32],
        sums: list[Sums],
    ) -> Float32:
        """Apply the tensor's rule to some elements; `chat` reads the chat model's own."""
        treatment, whole = _treatment(tensor), self.ranges.get(tensor.name)
        slerp = self.plan.config.method == "slerp"
        targets = [part.values.copy() for part in parts] if slerp else []
        if self.plan.config.interpolates:  # CPT is where the way to the chat model starts
            parts = [
                Part(Difference(formula.vector(part.values, cpt), cpt), part.shared)
                for part in parts
            ]
        for part, of_vector in zip(parts, sums, strict=True):
            self._count(place, cpt, part, of_vector)
        if treatment.action == "replace":
            return chat()
        if self.plan.config.method != "add" and not all(
            np.isfinite(part.values).all() for part in parts
        ):  # thinning would hide it
            self._check_models(tensor, cpt)
        factors = None
        if treatment.gate:
            factors = np.ones_like(cpt)  # also for rows that the base does not have
            known, base = parts[0].shared, parts[0].base
            assert base is not None, "the plan refuses a gate without a base"
            assert whole is not None, f"{tensor.name} has no range for its gate"
            change = movement(cpt[known], base[known])
            factors[known] = gate(change, whole.low, whole.high)
        vectors = targets or [part.values for part in parts]
        return combine(self.plan.config, treatment, place, cpt, vectors, factors, whole)

    def _count(self, place: Place, cpt: Float32, part: Part, sums: Sums) -> None:
        """Add what the sample has of some elements, or all of them, to the sums of a vector."""
        everything = self.plan.config.statistics == "all"
        if place.rows is None:
            sums.elements += place.count
            for here in [slice(None)] if everything else norms.windows(place.start, place.count):
                base = None if part.base is None else part.base[here]
                sums.count(cpt[here], base, part.values[here])
            return
        width = cpt.shape[1]
        shared = np.ones(len(cpt), np.bool_) if part.shared is ... else part.shared
        sums.elements += int(shared.sum()) * width
        numbers = np.flatnonzero(place.rows) + place.start // width
        picked = shared if everything else shared & norms.sampled_rows(numbers, width)
        base = None if part.base is None else part.base[picked]
        sums.count(cpt[picked], base, part.values[picked])

    def _check_models(self, tensor: PlannedTensor, cpt: Float32) -> None:
        """Raise `UserError` naming the models whose tensor holds NaN or Inf, if any does."""
        damaged = [] if np.isfinite(cpt).all() else ["the cpt model"]
        for label, model in self.plan.models().items():
            here = model.tensors.get(tensor.name)  # a tower may be in CPT alone
            if label != "cpt" and here and here.dtype in FLOATS and not _is_finite(model, here):
                damaged.append(
                    f"the {label} model" if label in ("base", "chat") else f"the {label}"
                )
        if damaged:
            models = " and of ".join(damaged)
            raise UserError(
                f"{tensor.name} of {models} holds NaN or Inf; use a checkpoint without."
            )

    def _moved_rows(self, treatment: Treatment, here: slice) -> NDArray[np.bool_]:
        """Which rows get something from a vector."""
        if treatment.action == "skip":
            return np.zeros(here.stop - here.start, np.bool_)
        if treatment.action == "replace":
            shared: NDArray[np.bool_] = self.plan.chat.rows.role[here] == Role.SHARED
            return shared
        moved = self.plan.chat.rows.has_vector[here].copy()
        for vector in self.plan.vectors[1:]:
            moved |= vector.rows.has_vector[here]
        return moved

    def _rows(
        self, tensor: PlannedTensor, vector: PlannedVector, here: slice, moved: NDArray[np.bool_]
    ) -> Part:
        """A vector's part in the moved rows: 0 if none, the constituents' mean for a new row."""
        alignment, name = vector.rows, tensor.name
        shared = alignment.role[here][moved] == Role.SHARED
        pairs = RowPairs(alignment.base[here][moved][shared], alignment.chat[here][moved][shared])
        found = vector.source.rows(name, pairs)
        if shared.all():
            return Part(found)
        values = np.zeros((len(shared), found.values.shape[1]), np.float32)
        values[shared] = found.values
        numbers = np.flatnonzero(moved) + here.start
        new = [
            place
            for place in np.flatnonzero(~shared).tolist()
            if numbers[place] in alignment.constituents
        ]
        if new:
            groups = [alignment.constituents[int(numbers[place])] for place in new]
            values[new] = mean_rows(vector.source, name, groups)
        base = None
        if found.base is not None:
            base = np.zeros_like(values)
            base[shared] = found.base
        return Part(Difference(values, base), shared)


def _is_finite(model: Checkpoint, info: TensorInfo) -> bool:
    return all(
        is_finite(model.read_flat(info.name, start, min(start + STEP, info.size)), info.dtype)
        for start in range(0, info.size, STEP)
    )


def _treatment(tensor: PlannedTensor) -> Treatment:
    assert tensor.treatment is not None, f"{tensor.name} is copied, not merged"
    return tensor.treatment


def thresholds(plan: MergePlan, tensor: PlannedTensor) -> list[float]:
    """For each vector the magnitude that the wanted share of its elements reaches."""
    density = plan.config.density
    if plan.config.method != "ties" or density is None or not tensor.gets_vector:
        return []
    return [
        magnitude_threshold(lambda vector=vector: _vector_parts(tensor, vector), density)  # type: ignore[misc]
        for vector in plan.vectors
    ]


def _vector_parts(tensor: PlannedTensor, vector: PlannedVector) -> Iterator[Float32]:
    """All elements that the vector has of a tensor."""
    if tensor.by_token:
        for rows in shared_rows(vector.rows, tensor.spec.shape):
            yield vector.source.rows(tensor.name, rows).values
        return
    for start in range(0, tensor.size, STEP):
        yield vector.source.elements(tensor.name, start, min(start + STEP, tensor.size)).values


def shared_rows(alignment: RowAlignment, shape: tuple[int, ...]) -> Iterator[RowPairs]:
    """The rows that a vector shares with the output, some at a time."""
    shared = np.flatnonzero(alignment.role[: shape[0]] == Role.SHARED)
    step = max(STEP // math.prod(shape[1:]), 1)
    for start in range(0, len(shared), step):
        part = shared[start : start + step]
        yield RowPairs(alignment.base[part], alignment.chat[part])


def joined(parts: Iterable[dict[str, Any]]) -> dict[str, TensorRange]:
    """One range for each tensor, from the ranges of several processes."""
    found: dict[str, TensorRange] = {}
    for part in parts:
        for name, values in part.items():
            here = found.setdefault(name, TensorRange([]))
            here.thresholds = values["thresholds"] or here.thresholds
            here.low, here.high = min(here.low, values["low"]), max(here.high, values["high"])
            here.products = Products(**values["products"]) if values["products"] else here.products
    return found


def as_json(ranges: dict[str, TensorRange]) -> dict[str, Any]:
    """The opposite of `joined`."""
    return {name: asdict(of_tensor) for name, of_tensor in ranges.items()}
