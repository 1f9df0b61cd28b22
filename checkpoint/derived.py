"""Tensors that no file stores: float32 values, computed from stored ones when they are read.

A quantised weight and its scales, or a weight and its adapter, are one such tensor. It has the name
and the shape that the model gives it, so whoever reads a checkpoint sees plain floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cpt_merge.checkpoint.dtypes import STORED, Array, Float32
from cpt_merge.checkpoint.headers import StridedInfo, TensorInfo

# elements [start, stop) of a tensor, as stored
ReadElements = Callable[[TensorInfo, int, int], Array]

_PIECE = 1 << 18  # elements that are computed at a time


@dataclass(frozen=True)
class DerivedInfo(TensorInfo):
    """A tensor that is computed. Its values do not depend on the parts in which it is read."""

    rounded_to: str  # the type of the model's other tensors
    parts: tuple[TensorInfo, ...]

    @property
    def copied_dtype(self) -> str:
        """Copies take no more room than the model's other tensors."""
        return self.rounded_to

    @property
    def files(self) -> set[str]:
        """The files of all parts."""
        return set().union(*(part.files for part in self.parts))

    @property
    def width(self) -> int:
        """Elements of a row of the last dimension."""
        return self.shape[-1]

    def rows(self, read: ReadElements, first: int, last: int) -> Float32:
        """Rows [first, last) of the last dimension, shape (last - first, width)."""
        raise NotImplementedError

    def compute(self, read: ReadElements, start: int, stop: int) -> Float32:
        """Elements [start, stop) in row-major order."""
        values = np.empty(stop - start, np.float32)
        step = max(_PIECE // self.width, 1)
        for first in range(start // self.width, -(-stop // self.width), step):
            last = min(first + step, -(-stop // self.width))
            begin, end = max(first * self.width, start), min(last * self.width, stop)
            rows = self.rows(read, first, last).reshape(-1)
            values[begin - start : end - start] = rows[begin - first * self.width :][: end - begin]
        return values


def strides_of(info: TensorInfo) -> tuple[int, ...]:
    """Bytes from an element to the next, per dimension."""
    if isinstance(info, StridedInfo):
        return info.strides
    itemsize = STORED[info.dtype].itemsize
    return tuple(math.prod(info.shape[axis + 1 :]) * itemsize for axis in range(len(info.shape)))


def window(info: TensorInfo, *ranges: tuple[int, int]) -> StridedInfo:
    """The elements [first, last) of each dimension of a stored tensor."""
    strides = strides_of(info)
    offset = info.offset + sum(
        first * stride for (first, _), stride in zip(ranges, strides, strict=True)
    )
    shape = tuple(last - first for first, last in ranges)
    nbytes = math.prod(shape) * STORED[info.dtype].itemsize
    return StridedInfo(info.name, info.dtype, shape, info.file, offset, nbytes, strides)


def transposed(info: TensorInfo) -> StridedInfo:
    """A stored matrix with its dimensions exchanged."""
    strides = strides_of(info)[::-1]
    return StridedInfo(
        info.name, info.dtype, info.shape[::-1], info.file, info.offset, info.nbytes, strides
    )
