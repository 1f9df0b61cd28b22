"""Rows of a model's tensors as rows of the stored tensors that hold their elements, and back.

Tensors that transformers joined in memory (the experts of a layer) are exported, merged and
previewed as the tensors of the base's files. Processes hold rows; a stored row has to be within one
row of the model's tensors, so that no process needs another one's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cpt_merge.checkpoint.export import LocalShard
from cpt_merge.checkpoint.model_names import StoredTensors
from cpt_merge.checkpoint.pieces import Piece
from cpt_merge.core.errors import UserError

Replace = Callable[[LocalShard], Tensor]


@dataclass(frozen=True)
class _StoredPart:
    """Rows of a stored tensor, and the blocks of the model's local rows that they consist of."""

    name: str
    shape: tuple[int, ...]
    start_row: int
    stop_row: int
    blocks: tuple[Piece, ...]

    @property
    def start(self) -> int:
        """Its first element, counted in the whole stored tensor."""
        return self.start_row * math.prod(self.shape[1:])

    @property
    def is_contiguous(self) -> bool:
        """Whether they are one run of elements on both sides."""
        first, *others = self.blocks
        return not others and first.strides == first.source_strides == (1,)

    def shard(self, local: Mapping[str, LocalShard]) -> LocalShard:
        """The rows; without a copy if they are one block."""
        shape = (self.stop_row - self.start_row, *self.shape[1:])
        if self.is_contiguous:
            values = _block(local, self.blocks[0]).view(shape)
        else:
            one = local[self.blocks[0].source].values
            values = torch.empty(shape, dtype=one.dtype, device=one.device)
            for block in self.blocks:
                self.view(values, block).copy_(_block(local, block))
        return LocalShard(self.name, self.shape, self.start_row, values)

    def view(self, values: Tensor, block: Piece) -> Tensor:
        """A block within the values of these rows."""
        flat = values.reshape(-1)
        offset = flat.storage_offset() + block.start - self.start
        return flat.as_strided(block.shape, block.strides, offset)


def stored_shards(found: StoredTensors, shards: Iterable[LocalShard]) -> Iterator[LocalShard]:
    """Shards of the model's tensors, by the model's names, as shards of the stored ones."""
    for local in _together(found, shards):
        for name, shard in local.items():
            if name not in found.rearranged:
                yield replace(shard, name=found.names.get(name, name))
        for part in _parts(found, local):
            yield part.shard(local)


def replaced_shards(
    found: StoredTensors, shards: Iterable[LocalShard], change: Replace
) -> Iterator[tuple[LocalShard, Tensor]]:
    """Each shard of the model's tensors with its new values: what `change` makes of stored ones."""
    for local in _together(found, shards):
        new = {
            name: replace(shard, values=torch.empty(shard.values.shape))
            for name, shard in local.items()
        }
        for part in _parts(found, local):
            changed = change(part.shard(local))
            for block in part.blocks:
                _block(new, block).copy_(part.view(changed, block))
        for name, shard in local.items():
            if name in found.rearranged:
                yield shard, new[name].values
            else:
                yield shard, change(replace(shard, name=found.names.get(name, name)))


def stored_views(found: StoredTensors, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The elements of each stored tensor within the tensors of a model, by the stored names.

    Raises `UserError` for a stored tensor whose elements are apart from each other there.
    """
    views = {stored: state[name] for name, stored in found.names.items()}
    shards = [LocalShard(name, tensor.shape, 0, state[name]) for name, tensor in
              found.rearranged.items()]  # fmt: skip
    for local in _together(found, shards):
        for part in _parts(found, local):
            if not part.is_contiguous:
                raise UserError(
                    f"{part.name} is in several places of {' and '.join(local)} in memory, where "
                    "it cannot be merged; merge from files."
                )
            views[part.name] = part.shard(local).values
    return views


def check_divisible(found: StoredTensors, directory: Path) -> None:
    """Raise `UserError` if processes that hold rows of the model cannot write rows of its files."""
    for group in {id(group): group for group in found.groups.values()}.values():
        rows = {name: _row_size(found.rearranged[name].shape) for name in group.tensors}
        for name, pieces in group.stored.items():
            size = _row_size(found.shapes[name])
            for row in {0, found.shapes[name][0] - 1}:
                places = {
                    (end // rows[block.source], found.rearranged[block.source].shape[0])
                    for piece in pieces
                    for block in piece.within(row * size, (row + 1) * size)
                    for end in (block.source_start, block.source_stop - 1)
                }
                if len(places) > 1:
                    raise UserError(
                        f"{directory} stores {name}, of which a row is in several rows of "
                        f"{' and '.join(group.tensors)} in memory, so it cannot be divided over "
                        "processes; train on one process without FSDP2."
                    )


def _together(
    found: StoredTensors, shards: Iterable[LocalShard]
) -> Iterator[dict[str, LocalShard]]:
    """Shards by name, those of a group together."""
    waiting: dict[int, dict[str, LocalShard]] = {}
    for shard in shards:
        if shard.name not in found.rearranged:
            yield {shard.name: shard}
            continue
        group = found.groups[shard.name]
        local = waiting.setdefault(id(group), {})
        local[shard.name] = shard
        if len(local) == len(group.tensors):
            yield waiting.pop(id(group))
    if waiting:
        incomplete = [*next(iter(waiting.values()))]
        raise ValueError(f"{incomplete} came without the other tensors of their group")


def _parts(found: StoredTensors, local: Mapping[str, LocalShard]) -> Iterator[_StoredPart]:
    """The rows of stored tensors that these shards of a group hold; none of other tensors."""
    first = next(iter(local))
    if first not in found.rearranged:
        return
    for stored, pieces in found.groups[first].stored.items():
        blocks = [
            block.inverted(piece.source)
            for piece in pieces
            for block in piece.inverted(stored).within(
                local[piece.source].start, local[piece.source].stop
            )
        ]
        yield from _rows(stored, found.shapes[stored], blocks)


def _rows(name: str, shape: tuple[int, ...], blocks: list[Piece]) -> Iterator[_StoredPart]:
    """The runs of rows that the blocks fill. Every row has to be filled or untouched."""
    size = _row_size(shape)
    filled = np.zeros(shape[0] + 2, np.int64)  # elements of each row, with an empty one at each end
    for block in blocks:
        if block.strides == (1,) and block.start % size == block.stop % size == 0:
            filled[1 + block.start // size : 1 + block.stop // size] += size
            continue
        for row in range(block.start // size, -(-block.stop // size)):
            in_row = block.within(row * size, (row + 1) * size)
            filled[1 + row] += sum(part.size for part in in_row)
    if np.any((filled != 0) & (filled != size)):
        raise ValueError(f"only parts of rows of {name} are here; see check_divisible")
    edges = np.flatnonzero(np.diff(filled))
    for start, stop in edges.reshape(-1, 2).tolist():
        inside = [part for block in blocks for part in block.within(start * size, stop * size)]
        yield _StoredPart(name, shape, start, stop, tuple(inside))


def _block(local: Mapping[str, LocalShard], block: Piece) -> Tensor:
    """The elements of a block, within the local values of its source."""
    shard = local[block.source]
    flat = shard.values.reshape(-1)
    offset = flat.storage_offset() + block.source_start - shard.start
    return flat.as_strided(block.shape, block.source_strides, offset)


def _row_size(shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:])
