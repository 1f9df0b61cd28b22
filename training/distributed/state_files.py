"""Weights and optimizer in torch's distributed format, which any number of processes can read.

Every process writes what it holds, and a file lists which box of which tensor is where. So the
layout of the processes that read may be another one than that of those that wrote.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from cpt_merge.training.distributed.parallel import Parallel

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes


class StateFiles:
    """Writes and reads the state of a backend: tensors, `DTensor`s and `FlatPart`s by names."""

    def __init__(self, parallel: Parallel) -> None:
        self.group = parallel.checkpoint_group
        pinned = parallel.device.type == "cuda"
        self._stager = DefaultStager(  # kept, so that its memory is allocated once
            StagingOptions(
                use_pinned_memory=pinned,
                use_non_blocking_copy=pinned,
                use_shared_memory=False,
                use_async_staging=False,
            )
        )

    def write(self, state: dict[str, Any], directory: Path, asynchronous: bool) -> Future[None]:
        """Write the state as it is now; a collective. The future is done when it is on disk."""
        # copying ahead would synchronise in torch's thread, whose device is GPU 0 on every rank
        writer = FileSystemWriter(directory, sync_files=True, per_thread_copy_ahead=0)
        if asynchronous:
            pending = async_save(
                state, storage_writer=writer, planner=_SavePlanner(), process_group=self.group,
                async_stager=self._stager,
            )  # fmt: skip
            assert isinstance(pending, Future)  # asynchronous staging alone gives another type
            return pending
        save(state, storage_writer=writer, planner=_SavePlanner(), process_group=self.group)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def read(self, state: dict[str, Any], directory: Path) -> None:
        """Read what the state names into its tensors; a collective."""
        load(
            state,
            storage_reader=FileSystemReader(directory),
            planner=_LoadPlanner(),
            process_group=self.group,
        )

    def close(self) -> None:
        """Free the memory of copies."""
        self._stager.close()


@dataclass(frozen=True)
class FlatPart:
    """Elements [first, first + len(values)) of a tensor, in the order of memory.

    torch's format knows boxes, so they are written and read as few of those. `size` and the
    methods with underscores are torch's protocol for what is not whole on one process.
    """

    shape: tuple[int, ...]  # of the whole tensor
    first: int
    values: Tensor  # flat; is read into

    def share(self, rank: int, size: int) -> FlatPart:
        """One of `size` shares of what is whole on all processes; what is a part is one."""
        if size == 1 or len(self.values) < math.prod(self.shape):
            return self
        count = -(-len(self.values) // size)
        mine = self.values[rank * count : (rank + 1) * count]
        return FlatPart(self.shape, rank * count, mine.clone())  # what is staged is a whole storage

    def boxes(self) -> Iterator[tuple[Box, Tensor]]:
        """Each box with a view of its values."""
        start = 0
        for offsets, sizes in boxes(self.shape, self.first, self.first + len(self.values)):
            count = math.prod(sizes)
            yield (offsets, sizes), self.values[start : start + count].view(sizes)
            start += count

    def size(self) -> torch.Size:
        """The shape, which must be that of the files."""
        return torch.Size(self.shape)

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.values)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            for (offsets, sizes), _ in self.boxes()
        ]

    def at(self, offset: Sequence[int] | None) -> Tensor:
        """The values of the box that begins there."""
        return next(
            values for (offsets, _), values in self.boxes() if offsets == tuple(offset or ())
        )


def boxes(shape: Sequence[int], first: int, last: int) -> Iterator[Box]:
    """The fewest boxes of a tensor that together are its elements [first, last), in order."""
    if first >= last:
        return
    if len(shape) < 2:
        yield ((first,), (last - first,)) if shape else ((), ())
        return
    width = math.prod(shape[1:])
    row, column = divmod(first, width)
    if column or last - first < width:  # a part of one row
        stop = min(last, (row + 1) * width)
        for offsets, sizes in boxes(shape[1:], column, column + stop - first):
            yield (row, *offsets), (1, *sizes)
        yield from boxes(shape, stop, last)
        return
    rows = (last - first) // width
    yield (row, *(0 for _ in shape[1:])), (rows, *shape[1:])
    yield from boxes(shape, (row + rows) * width, last)


class _SavePlanner(DefaultSavePlanner):
    """Finds the boxes of a `FlatPart`."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return (
            found.at(index.offset) if isinstance(found, FlatPart) else super().lookup_object(index)
        )


class _LoadPlanner(DefaultLoadPlanner):
    """Finds the boxes of a `FlatPart`."""

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """As torch does, which puts None where it does not know what is to be read."""
        super().set_up_planner(_copied(state_dict), metadata, is_coordinator)
        self.original_state_dict = state_dict
        for name, path in self.mappings.items():
            found: Any = state_dict
            for key in path:
                found = found[key]
            self.state_dict[name] = found

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found = self.state_dict[index.fqn]
        return (
            found.at(index.offset) if isinstance(found, FlatPart) else super().lookup_tensor(index)
        )


def _copied(state: Any) -> Any:
    """Copies of the dictionaries, with the same values."""
    if isinstance(state, dict):
        return {name: _copied(value) for name, value in state.items()}
    return state
