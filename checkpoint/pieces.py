"""Tensors whose elements are in other tensors, in another order.

Transformers joins stored tensors when it loads some models: the matrices of a layer's experts,
which files hold one by one, are one tensor in memory. Such a tensor consists of blocks of stored
ones, and a stored one of blocks of it; both directions are `Piece`s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cpt_merge.checkpoint.derived import DerivedInfo, ReadElements
from cpt_merge.checkpoint.dtypes import STORED, Array, widen
from cpt_merge.checkpoint.headers import TensorInfo


@dataclass(frozen=True)
class Piece:
    """A block of a tensor that is also a block of the tensor `source`.

    Element (i, j, ...) of the block, which has `shape`, is element start + i strides[0] + j
    strides[1] + ... of the tensor and element source_start + i source_strides[0] + ... of `source`,
    both counted in row-major order. No strides are negative, and the largest one comes first.
    """

    source: str
    shape: tuple[int, ...]
    start: int
    strides: tuple[int, ...]
    source_start: int
    source_strides: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        """One past its last element, in the tensor."""
        return self.start + _length(self.shape, self.strides)

    @property
    def source_stop(self) -> int:
        """One past its last element, in `source`."""
        return self.source_start + _length(self.shape, self.source_strides)

    def inverted(self, name: str) -> Piece:
        """The same block as one of `source`, whose source is the tensor `name`."""
        return simplified(
            Piece(
                name, self.shape, self.source_start, self.source_strides, self.start, self.strides
            )
        )

    def within(self, first: int, last: int) -> Iterator[Piece]:
        """The block's elements that are among [first, last) of the tensor."""
        if first <= self.start and self.stop <= last:
            yield self
        elif self.start < last and first < self.stop:
            stride, count = self.strides[0], self.shape[0]
            inner = self.stop - self.start - (count - 1) * stride
            whole = range(
                max(-((self.start - first) // stride), 0),
                min((last - inner - self.start) // stride + 1, count),
            )
            touched = range(
                max((first - inner - self.start) // stride + 1, 0),
                min(-((self.start - last) // stride), count),
            )
            if whole:
                yield self._indices(whole)
            for index in touched:
                if index not in whole:
                    yield from self._indices(range(index, index + 1)).within(first, last)

    def _indices(self, chosen: range) -> Piece:
        """The block of these indices of the first dimension."""
        part = replace(
            self,
            shape=(len(chosen), *self.shape[1:]),
            start=self.start + chosen.start * self.strides[0],
            source_start=self.source_start + chosen.start * self.source_strides[0],
        )
        return simplified(part) if len(chosen) == 1 else part


def simplified(piece: Piece) -> Piece:
    """The same block in as few dimensions as possible, the one with the largest stride first."""
    dims = sorted(
        (
            dim
            for dim in zip(piece.shape, piece.strides, piece.source_strides, strict=True)
            if dim[0] > 1
        ),
        key=lambda dim: -dim[1],
    )
    merged: list[tuple[int, int, int]] = []
    for count, stride, source_stride in dims or [(1, 1, 1)]:
        before = merged[-1] if merged else (0, 0, 0)
        if merged and before[1:] == (count * stride, count * source_stride):
            merged[-1] = (before[0] * count, stride, source_stride)
        else:
            merged.append((count, stride, source_stride))
    shape, strides, source_strides = zip(*merged, strict=True)
    return replace(piece, shape=shape, strides=strides, source_strides=source_strides)


def inverted(pieces: Mapping[str, Sequence[Piece]]) -> dict[str, tuple[Piece, ...]]:
    """The pieces of the sources; `pieces` are those of the tensors that consist of them."""
    found: dict[str, list[Piece]] = {}
    for name, of_tensor in pieces.items():
        for piece in of_tensor:
            found.setdefault(piece.source, []).append(piece.inverted(name))
    return {source: tuple(of_source) for source, of_source in found.items()}


@dataclass(frozen=True)
class RearrangedInfo(DerivedInfo):
    """A tensor that consists of blocks of others; block i is in `parts[i]`.

    It has the type of its parts, and float32 if these have several.
    """

    pieces: tuple[Piece, ...]

    @staticmethod
    def of(
        name: str,
        shape: tuple[int, ...],
        pieces: Sequence[Piece],
        tensors: Mapping[str, TensorInfo],
    ) -> RearrangedInfo:
        """The tensor of these pieces, whose sources are in `tensors`."""
        parts = tuple(tensors[piece.source] for piece in pieces)
        dtypes = {part.dtype for part in parts}
        dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
        rounded = {part.copied_dtype for part in parts}
        return RearrangedInfo(
            name, dtype, shape, parts[0].file, 0, math.prod(shape) * STORED[dtype].itemsize,
            rounded.pop() if len(rounded) == 1 else "F32", parts, tuple(pieces),
        )  # fmt: skip

    def shares(self) -> dict[str, float]:
        """How much of each stored tensor is in this one."""
        found: dict[str, float] = {}
        for piece, part in zip(self.pieces, self.parts, strict=True):
            inner = part.shares() if isinstance(part, RearrangedInfo) else {part.name: 1.0}
            for name, share in inner.items():
                found[name] = found.get(name, 0.0) + share * piece.size / part.size
        return found

    def compute(self, read: ReadElements, start: int, stop: int) -> Array:
        """Elements [start, stop) in row-major order, in the tensor's type."""
        values = np.empty(stop - start, STORED[self.dtype])
        for piece, part in zip(self.pieces, self.parts, strict=True):
            for found in piece.within(start, stop):
                stored = read(part, found.source_start, found.source_stop)
                if part.dtype != self.dtype:
                    stored = widen(stored, part.dtype)
                block = _view(stored, 0, found.shape, found.source_strides)
                _view(values, found.start - start, found.shape, found.strides)[...] = block
        return values


def _view(flat: Array, start: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    itemsize = flat.dtype.itemsize
    return np.ndarray(
        shape, flat.dtype, flat, start * itemsize, [stride * itemsize for stride in strides]
    )


def _length(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first one of a block to its last one, both included."""
    return 1 + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
