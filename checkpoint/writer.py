"""Write a checkpoint in place: any number of processes write rows at their offsets.

The layout is computed first. All writing happens in `<out>.tmp`, which takes the name `out` at the
end, after a proof that every element was written exactly once. The order of calls:

    one process     writer.prepare()      the directory, every header, the room on disk
    every process   writer.write(...)     any rows, in any order, from any thread
    every process   writer.close()        its data and the list of what it wrote are on disk
    one process     writer.publish()      proof, index, fsync, rename

Between these calls the processes must wait for each other.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpt_merge.checkpoint.dtypes import STORED, Array
from cpt_merge.checkpoint.headers import TensorInfo
from cpt_merge.checkpoint.reader import Checkpoint, index_file
from cpt_merge.core.artifact import Staging, fsync, write_json
from cpt_merge.core.errors import UserError

SHARD_BYTES = 5_000_000_000

_JOURNALS = "written-*.json"
# files that processes write for each other; not part of the result
SCRATCH = ("written-*", "ranges-*", "failed-*", "stopped-*")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to write. `dtype` as in a safetensors header."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of its elements."""
        return math.prod(self.shape) * STORED[self.dtype].itemsize


@dataclass(frozen=True)
class CheckpointLayout:
    """Where every tensor will be stored. It does not depend on the order of the tensors."""

    tensors: dict[str, TensorInfo]
    headers: dict[str, bytes]  # file -> its first bytes
    index: str | None  # the name of the index file

    @staticmethod
    def by_size(
        specs: Iterable[TensorSpec], shard_bytes: int = SHARD_BYTES, stem: str = "model"
    ) -> CheckpointLayout:
        """Files of at most `shard_bytes` or one tensor, with the names that transformers uses."""
        shards: list[list[TensorSpec]] = [[]]
        filled = 0
        for spec in sorted(specs, key=lambda spec: natural(spec.name)):
            if shards[-1] and filled + spec.nbytes > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(spec)
            filled += spec.nbytes
        if len(shards) == 1:
            return CheckpointLayout.of_files({f"{stem}.safetensors": shards[0]})
        count = len(shards)
        files = {
            f"{stem}-{number:05d}-of-{count:05d}.safetensors": shard
            for number, shard in enumerate(shards, start=1)
        }
        return CheckpointLayout.of_files(files, index=index_file(stem))

    @staticmethod
    def of_files(
        files: Mapping[str, Iterable[TensorSpec]], index: str | None = None
    ) -> CheckpointLayout:
        """The given files with the given tensors, and the name of their index."""
        tensors: dict[str, TensorInfo] = {}
        headers: dict[str, bytes] = {}
        for file, specs in files.items():
            headers[file], infos = _lay_out(file, specs)
            tensors.update({info.name: info for info in infos})
        return CheckpointLayout(tensors, headers, index)

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def file_size(self, file: str) -> int:
        """Size of one file."""
        data = sum(info.nbytes for info in self.tensors.values() if info.file == file)
        return len(self.headers[file]) + data


def _lay_out(file: str, specs: Iterable[TensorSpec]) -> tuple[bytes, list[TensorInfo]]:
    """The header of a file, and its tensors in storage order.

    Wide types come first so that every element is aligned; the header is padded to a multiple of 8
    bytes, as in the safetensors library.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(specs, key=lambda spec: (-STORED[spec.dtype].itemsize, natural(spec.name)))
    offset, starts = 0, []
    for spec in ordered:
        span = [offset, offset + spec.nbytes]
        starts.append(offset)
        offset = span[1]
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": span}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    infos = [
        TensorInfo(spec.name, spec.dtype, spec.shape, file, len(header) + start, spec.nbytes)
        for spec, start in zip(ordered, starts, strict=True)
    ]
    return header, infos


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


class CheckpointFiles:
    """The files of an unfinished checkpoint; any thread or process writes any part of a tensor."""

    def __init__(self, directory: Path, layout: CheckpointLayout) -> None:
        self.directory, self.layout = directory, layout
        self._handles: dict[str, int] = {}
        self._lock = threading.Lock()

    def create(self) -> None:
        """Make every file. Raises `UserError` if the disk has no room for them."""
        check_room(self.directory, self.layout)
        self.lay_out()

    def lay_out(self) -> None:
        """Give every file its size and its header; the data after the header stays as it is."""
        for file, header in self.layout.headers.items():
            handle = os.open(self.directory / file, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.posix_fallocate(handle, 0, self.layout.file_size(file))
                os.pwrite(handle, header, 0)
                os.fsync(handle)
            finally:
                os.close(handle)
        fsync(self.directory)

    def write(self, name: str, start_row: int, rows: Array) -> None:
        """Write rows of dimension 0 from `start_row` on, in the stored type."""
        self.write_flat(name, start_row * self.layout.tensors[name].row_size, rows)

    def write_flat(self, name: str, start: int, values: Array) -> None:
        """Write elements from `start` on, in row-major order and in the stored type."""
        info = self.layout.tensors[name]
        if values.dtype != STORED[info.dtype] or start < 0 or start + values.size > info.size:
            raise ValueError(f"{values.size} {values.dtype} at {start} do not fit {info}")
        view = values.reshape(-1).view(np.uint8).data
        offset, handle = info.offset + start * values.itemsize, self._handle(info.file)
        while view:
            count = os.pwrite(handle, view, offset)
            view, offset = view[count:], offset + count

    def copy(self, source: Checkpoint, names: Iterable[str]) -> None:
        """Copy whole tensors as they are."""
        for name in names:
            self.write_flat(name, 0, source.read_flat(name, 0, source.info(name).size))

    def sync(self) -> None:
        """Make everything written so far durable. Other threads may write at the same time."""
        with self._lock:
            handles = list(self._handles.values())
        for handle in handles:
            os.fdatasync(handle)

    def release(self) -> None:
        """Close the files."""
        with self._lock:
            for handle in self._handles.values():
                os.close(handle)
            self._handles.clear()

    def write_index(self) -> None:
        """Write the index of the layout, if it has one."""
        if self.layout.index:
            files = {name: info.file for name, info in self.layout.tensors.items()}
            write_index(self.directory / self.layout.index, files, self.layout.nbytes)

    def _handle(self, file: str) -> int:
        with self._lock:
            if file not in self._handles:
                self._handles[file] = os.open(self.directory / file, os.O_WRONLY)
            return self._handles[file]


class CheckpointWriter(CheckpointFiles):
    """Writes one checkpoint as one of several processes, and proves that it is complete."""

    def __init__(self, out: Path, layout: CheckpointLayout, rank: int = 0) -> None:
        self.staging = Staging(out, scratch=SCRATCH)
        super().__init__(self.staging.directory, layout)  # other files may be added to it
        self.rank = rank
        # tensor -> {stop: start} of the intervals that were written, in elements
        self._written: dict[str, dict[int, int]] = defaultdict(dict)
        self._written_lock = threading.Lock()

    def prepare(self) -> None:
        """Make the directory with every file. Raises `UserError` if it is in use or lacks room."""
        self.staging.begin(self.create)

    def write_flat(self, name: str, start: int, values: Array) -> None:
        """Write elements from `start` on, in row-major order and in the stored type."""
        super().write_flat(name, start, values)
        with self._written_lock:  # joins the interval to the one that ends at its start
            ends = self._written[name]
            if values.size and start + values.size in ends:
                raise UserError(
                    f"elements up to {start + values.size} of {name} were written twice."
                )
            ends[start + values.size] = ends.pop(start, start)

    def close(self) -> None:
        """Make the data durable, then list it in `written-<rank>.json`. Closes the files."""
        self.sync()
        self.release()
        parts = {
            name: sorted((start, stop) for stop, start in ends.items())
            for name, ends in self._written.items()
        }
        write_json(self.directory / f"written-{self.rank:05d}.json", parts)

    def publish(self) -> None:
        """Prove that nothing is missing, write the index, and give the directory its name."""
        journals = sorted(self.directory.glob(_JOURNALS))
        _prove_whole(self.layout, [json.loads(journal.read_text()) for journal in journals])
        self.write_index()
        self.staging.commit()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For one process: prepare, the block, close and publish. A failure leaves no files."""
        self.prepare()
        try:
            yield
            self.close()
            self.publish()
        except BaseException:
            self.release()
            self.staging.discard()
            raise


def write_index(path: Path, files: Mapping[str, str], total_size: int) -> None:
    """Write a `model.safetensors.index.json`: the file of each tensor, and the size of all."""
    weight_map = {name: files[name] for name in sorted(files, key=natural)}
    write_json(path, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def check_room(directory: Path, layout: CheckpointLayout) -> None:
    """Raise `UserError` if the disk of `directory`, which may not exist yet, lacks room."""
    while not directory.exists():
        directory = directory.parent
    needed = sum(layout.file_size(file) for file in layout.headers)
    free = shutil.disk_usage(directory).free
    if needed > free:
        digits = 1 if needed - free > 1e5 else 6  # so that the two numbers differ
        raise UserError(
            f"{directory} has {free / 1e6:,.{digits}f} MB free, the checkpoint needs "
            f"{needed / 1e6:,.{digits}f} MB; free some."
        )


def _prove_whole(layout: CheckpointLayout, journals: list[dict[str, list[list[int]]]]) -> None:
    """Raise `UserError` naming the first tensor that was not written exactly once."""
    for name, info in layout.tensors.items():
        reached = 0
        for start, stop in sorted(part for journal in journals for part in journal.get(name, [])):
            if stop > start and start != reached:
                first, last = sorted((start, reached))
                what = "twice" if start < reached else "never"
                raise UserError(f"elements {first} to {last} of {name} were written {what}.")
            reached = max(reached, stop)
        if reached != info.size:
            raise UserError(
                f"elements {reached} to {info.size} of {name} were never written; the output is "
                "not kept."
            )
