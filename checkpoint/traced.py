"""Tensors without values that remember where their elements come from.

Whatever rearranges tensors (joins, splits, transposes, reshapes) can be run on them; the result
says from which blocks of which tensors it was made. Anything that computes values is a
`NotMovedError`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from cpt_merge.checkpoint.pieces import Piece, simplified

_aten = torch.ops.aten


class NotMovedError(Exception):
    """An operation that does more than to move elements; its message names the operation."""


@dataclass(frozen=True)
class _Box:
    """A rectangular block: its place in the tensor, and in `source` the element of its first corner
    and the elements from one to the next, per dimension of the tensor."""

    source: str
    origin: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    strides: tuple[int, ...]

    def permuted(self, dims: Sequence[int]) -> _Box:
        """With its dimensions in another order."""
        origin, shape, strides = (
            tuple(values[dim] for dim in dims) for values in (self.origin, self.shape, self.strides)
        )
        return _Box(self.source, origin, shape, self.start, strides)

    def cut(self, dim: int, first: int, last: int) -> _Box | None:
        """The part in [first, last) of a dimension, moved to its beginning; None if it is empty."""
        begin = max(self.origin[dim], first)
        count = min(self.origin[dim] + self.shape[dim], last) - begin
        if count <= 0:
            return None
        skipped = (begin - self.origin[dim]) * self.strides[dim]
        moved = replace(self, start=self.start + skipped)
        return moved.with_dim(dim, [(begin - first, count, self.strides[dim])])

    def with_dim(self, dim: int, dims: Sequence[tuple[int, int, int]]) -> _Box:
        """With other dimensions, of (origin, shape, stride) each, instead of one."""
        return self.with_dims(dim, dim + 1, dims)

    def with_dims(self, first: int, last: int, dims: Sequence[tuple[int, int, int]]) -> _Box:
        """With other dimensions instead of [first, last)."""
        origin, shape, strides = zip(*dims, strict=True) if dims else ((), (), ())
        return replace(
            self,
            origin=(*self.origin[:first], *origin, *self.origin[last:]),
            shape=(*self.shape[:first], *shape, *self.shape[last:]),
            strides=(*self.strides[:first], *strides, *self.strides[last:]),
        )

    def joined(self, dim: int, length: int) -> Iterator[_Box]:
        """`dim` and the next one, whose length in the tensor is `length`, as one dimension."""
        (o, p), (a, b), (s, t) = (
            values[dim : dim + 2] for values in (self.origin, self.shape, self.strides)
        )
        if a == 1 or (b == length and s == b * t):
            yield self.with_dims(dim, dim + 2, [(o * length + p, a * b, t)])
            return
        for row in range(a):
            one = replace(self, start=self.start + row * s)
            yield one.with_dims(dim, dim + 2, [((o + row) * length + p, b, t)])

    def split(self, dim: int, length: int) -> Iterator[_Box]:
        """A dimension as two, of which the second one has this length in the tensor."""
        origin, count, stride = self.origin[dim], self.shape[dim], self.strides[dim]
        edges = {origin, origin + count, -(-origin // length) * length}
        edges.add((origin + count) // length * length)
        inside = sorted(edge for edge in edges if origin <= edge <= origin + count)
        for first, last in itertools.pairwise(inside):
            part = replace(self, start=self.start + (first - origin) * stride)
            row, column = divmod(first, length)
            rows, columns = max((last - first) // length, 1), min(last - first, length)
            yield part.with_dim(dim, [(row, rows, length * stride), (column, columns, stride)])


class TracedTensor(torch.Tensor):
    """A tensor that knows the blocks it is made of."""

    boxes: tuple[_Box, ...]

    def __new__(cls, shape: Sequence[int], boxes: Iterable[_Box]) -> Self:
        """A tensor of this shape, which the boxes fill."""
        found: Self = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=torch.float32, device=torch.device("meta")
        )
        found.boxes = tuple(boxes)
        return found

    @staticmethod
    def stored(name: str, shape: Sequence[int]) -> TracedTensor:
        """A tensor that is its own source."""
        strides = _row_major(shape)
        return TracedTensor(shape, [_Box(name, (0,) * len(shape), tuple(shape), 0, strides)])

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Where its elements come from."""
        strides = _row_major(self.shape)
        return tuple(
            simplified(
                Piece(
                    box.source, box.shape,
                    sum(o * s for o, s in zip(box.origin, strides, strict=True)), strides,
                    box.start, box.strides,
                )
            )
            for box in self.boxes
        )  # fmt: skip

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, arguments: Any = (), names: Any = None
    ) -> Any:
        move = _MOVES.get(function.overloadpacket)
        if move is None:
            raise NotMovedError(str(function.overloadpacket))
        return move(*arguments, **(names or {}))


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _same(tensor: TracedTensor, *_: Any, **__: Any) -> TracedTensor:
    return TracedTensor(tensor.shape, tensor.boxes)


def _permute(tensor: TracedTensor, dims: Sequence[int]) -> TracedTensor:
    shape = [tensor.shape[dim] for dim in dims]
    order = [dim % tensor.ndim for dim in dims]
    return TracedTensor(shape, [box.permuted(order) for box in tensor.boxes])


def _transpose(tensor: TracedTensor, first: int, second: int) -> TracedTensor:
    dims = list(range(tensor.ndim))
    dims[first], dims[second] = dims[second], dims[first]
    return _permute(tensor, dims)


def _matrix_transpose(tensor: TracedTensor) -> TracedTensor:
    return _permute(tensor, list(range(tensor.ndim))[::-1])


def _cat(tensors: Sequence[TracedTensor], dim: int = 0) -> TracedTensor:
    dim %= tensors[0].ndim
    boxes, reached = [], 0
    for tensor in tensors:
        for box in tensor.boxes:
            place = (box.origin[dim] + reached, box.shape[dim], box.strides[dim])
            boxes.append(box.with_dim(dim, [place]))
        reached += tensor.shape[dim]
    shape = list(tensors[0].shape)
    shape[dim] = reached
    return TracedTensor(shape, boxes)


def _stack(tensors: Sequence[TracedTensor], dim: int = 0) -> TracedTensor:
    return _cat([_unsqueeze(tensor, dim) for tensor in tensors], dim)


def _unsqueeze(tensor: TracedTensor, dim: int) -> TracedTensor:
    dim %= tensor.ndim + 1
    shape = [*tensor.shape[:dim], 1, *tensor.shape[dim:]]
    return TracedTensor(shape, [box.with_dims(dim, dim, [(0, 1, 0)]) for box in tensor.boxes])


def _squeeze(tensor: TracedTensor, dims: int | Sequence[int]) -> TracedTensor:
    for dim in sorted({d % tensor.ndim for d in ([dims] if isinstance(dims, int) else dims)})[::-1]:
        if tensor.shape[dim] == 1:
            shape = [*tensor.shape[:dim], *tensor.shape[dim + 1 :]]
            tensor = TracedTensor(shape, [box.with_dim(dim, []) for box in tensor.boxes])
    return _same(tensor)  # torch wants a new one, also where nothing was left out


def _slice(
    tensor: TracedTensor, dim: int = 0, first: int | None = None, last: int | None = None,
    step: int = 1,
) -> TracedTensor:  # fmt: skip
    if step != 1:
        raise NotMovedError("a slice with steps")
    begin, end, _ = slice(first, last).indices(tensor.shape[dim])
    boxes = (box.cut(dim % tensor.ndim, begin, end) for box in tensor.boxes)
    shape = list(tensor.shape)
    shape[dim] = max(end - begin, 0)
    return TracedTensor(shape, [box for box in boxes if box])


def _select(tensor: TracedTensor, dim: int, index: int) -> TracedTensor:
    index %= tensor.shape[dim]
    return _squeeze(_slice(tensor, dim, index, index + 1), dim)


def _unbind(tensor: TracedTensor, dim: int = 0) -> list[TracedTensor]:
    return [_select(tensor, dim, index) for index in range(tensor.shape[dim])]


def _split(tensor: TracedTensor, sizes: int | Sequence[int], dim: int = 0) -> list[TracedTensor]:
    if isinstance(sizes, int):
        whole, rest = divmod(tensor.shape[dim], sizes)
        sizes = [sizes] * whole + [rest] * bool(rest)
    edges = [0, *itertools.accumulate(sizes)]
    return [_slice(tensor, dim, first, last) for first, last in itertools.pairwise(edges)]


def _view(tensor: TracedTensor, shape: Sequence[int]) -> TracedTensor:
    """Another shape for elements in row-major order: joins dimensions, and splits them."""
    known = math.prod(length for length in shape if length >= 0)
    wanted = [length if length >= 0 else tensor.numel() // known for length in shape]
    found, boxes, dim = list(tensor.shape), list(tensor.boxes), 0
    while dim < max(len(found), len(wanted)):
        if dim >= len(found):  # what is left to add are dimensions of length 1
            found.append(1)
            boxes = [box.with_dims(dim, dim, [(0, 1, 0)]) for box in boxes]
        elif dim < len(wanted) and found[dim] == wanted[dim]:
            dim += 1
        elif dim < len(wanted) and wanted[dim] and found[dim] % wanted[dim] == 0:
            rest = found[dim] // wanted[dim]
            boxes = [part for box in boxes for part in box.split(dim, rest)]
            found[dim : dim + 1] = [wanted[dim], rest]
        elif dim + 1 < len(found):
            length = found[dim + 1]
            boxes = [part for box in boxes for part in box.joined(dim, length)]
            found[dim : dim + 2] = [found[dim] * length]
        else:  # only dimensions of length 1 are left over
            boxes = [box.with_dim(dim, []) for box in boxes]
            del found[dim]
    return TracedTensor(found, boxes)


_MOVES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((_aten.clone, _aten.detach, _aten.alias, _aten._to_copy), _same),
    **dict.fromkeys((_aten.view, _aten._unsafe_view, _aten.reshape), _view),
    **dict.fromkeys((_aten.split, _aten.split_with_sizes), _split),
    **dict.fromkeys((_aten.squeeze,), _squeeze),
    _aten.permute: _permute, _aten.transpose: _transpose, _aten.t: _matrix_transpose,
    _aten.cat: _cat, _aten.stack: _stack, _aten.unsqueeze: _unsqueeze, _aten.slice: _slice,
    _aten.select: _select, _aten.unbind: _unbind,
}  # fmt: skip
