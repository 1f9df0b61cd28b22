"""Read a Hugging Face checkpoint lazily: first the headers, then any rows of any tensor.

Neither torch nor a model is needed for safetensors; .bin files need torch for their headers.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt_merge.checkpoint.dtypes import STORED, Array, Float32, widen
from cpt_merge.checkpoint.headers import StridedInfo, TensorInfo, read_header
from cpt_merge.checkpoint.pickled import read_pickled
from cpt_merge.core.artifact import read_marker
from cpt_merge.core.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass
class Checkpoint:
    """The weights of a directory, safetensors or .bin. Several threads may read at once."""

    directory: Path
    tensors: dict[str, TensorInfo]
    _files: dict[str, FileIO] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @staticmethod
    def open(directory: Path, stem: str = "model") -> Checkpoint:
        """Read and check the headers of the files whose names begin with `stem`.

        Raises `UserError` that names a missing or damaged file.
        """
        directory = Path(directory)
        if read_marker(directory) is not None:
            raise UserError(
                f"{directory} was never finished; run the command that writes it again."
            )
        single, index = directory / f"{stem}.safetensors", directory / index_file(stem)
        if single.is_file():
            return Checkpoint(directory, read_header(single))
        if index.is_file():
            return Checkpoint(directory, _read_indexed(index))
        pickled = directory / f"pytorch_{stem}.bin"
        if pickled.is_file():
            return Checkpoint(directory, read_pickled(pickled))
        pickled_index = directory / f"pytorch_{stem}.bin.index.json"
        if pickled_index.is_file():
            return Checkpoint(directory, _read_indexed(pickled_index, read_pickled))
        raise UserError(_nothing_there(directory))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json. Raises `UserError` if it is missing or damaged."""
        return read_json(self.directory / "config.json")

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(info.size for info in self.tensors.values())

    def info(self, name: str) -> TensorInfo:
        """Where a tensor is stored. Raises `UserError` if there is none of that name."""
        if name not in self.tensors:
            raise UserError(
                f"{self.directory} contains no tensor {name}; use a checkpoint of the same "
                "architecture."
            )
        return self.tensors[name]

    def read_flat(self, name: str, start: int, stop: int) -> Array:
        """Elements [start, stop) in row-major order, as stored (bfloat16 as uint16)."""
        info = self.info(name)
        if not 0 <= start <= stop <= info.size:
            raise IndexError(f"{name} has {info.size} elements, asked for [{start}, {stop})")
        if isinstance(info, StridedInfo):
            mapped = np.memmap(self.directory / info.file, mode="r")
            elements: Array = np.ndarray(
                info.shape, STORED[info.dtype], mapped, info.offset, info.strides
            )
            return elements.flat[start:stop]
        values = np.empty(stop - start, STORED[info.dtype])
        view = values.view(np.uint8).data
        offset, file = info.offset + start * values.itemsize, self._file(info.file)
        while view:
            count = os.preadv(file.fileno(), [view], offset)
            if count == 0:
                raise UserError(
                    f"{self.directory / info.file} ends within {name}; copy or download it again."
                )
            view, offset = view[count:], offset + count
        return values

    def expect(self, name: str, start: int, stop: int) -> None:
        """Ask the operating system to fetch elements [start, stop), which will be read soon."""
        info = self.info(name)
        itemsize = STORED[info.dtype].itemsize
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(
                self._file(info.file).fileno(),
                info.offset + start * itemsize,
                (stop - start) * itemsize,
                os.POSIX_FADV_WILLNEED,
            )

    def read(self, name: str, start_row: int = 0, stop_row: int | None = None) -> Array:
        """Rows [start_row, stop_row) as stored, shape (rows, ...); a scalar has shape ()."""
        info = self.info(name)
        if not info.shape:
            return self.read_flat(name, 0, 1).reshape(())
        stop_row = info.shape[0] if stop_row is None else stop_row
        flat = self.read_flat(name, start_row * info.row_size, stop_row * info.row_size)
        return flat.reshape(stop_row - start_row, *info.shape[1:])

    def read_float32(self, name: str, start_row: int = 0, stop_row: int | None = None) -> Float32:
        """`read`, widened to float32. Raises `UserError` for types other than plain floats."""
        return widen(self.read(name, start_row, stop_row), self.info(name).dtype)

    def mean_row(self, name: str) -> Float32:
        """The mean of a matrix's rows, summed in float64; shape (width,)."""
        info = self.info(name)
        total = np.zeros(info.row_size)
        for start in range(0, info.shape[0], 1024):
            rows = self.read_float32(name, start, min(start + 1024, info.shape[0]))
            total += rows.reshape(-1, info.row_size).sum(axis=0, dtype=np.float64)
        return (total / info.shape[0]).astype(np.float32)

    def gather_float32(self, name: str, rows: NDArray[np.int64]) -> Float32:
        """The given rows in the given order, float32, shape (len(rows), row size)."""
        info = self.info(name)
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        if len(rows) and not len(breaks):
            return self.read_float32(name, int(rows[0]), int(rows[-1]) + 1).reshape(len(rows), -1)
        gathered = np.empty((len(rows), info.row_size), np.float32)
        for start, stop in pairwise([0, *breaks.tolist(), len(rows)]):
            if stop > start:
                values = self.read_float32(name, int(rows[start]), int(rows[stop - 1]) + 1)
                gathered[start:stop] = values.reshape(stop - start, -1)
        return gathered

    def _file(self, name: str) -> FileIO:
        with self._lock:
            if name not in self._files:
                self._files[name] = FileIO(self.directory / name)
            return self._files[name]


def index_file(stem: str) -> str:
    """The name of the index of files `<stem>-00001-of-0000N.safetensors`."""
    return f"{stem}.safetensors.index.json"


def _read_indexed(
    index: Path, read: Callable[[Path], dict[str, TensorInfo]] = read_header
) -> dict[str, TensorInfo]:
    directory = index.parent
    try:
        weight_map = dict(read_json(index)["weight_map"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{index} has no weight_map; copy or download it again.") from None
    headers: dict[str, dict[str, TensorInfo]] = {}
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(
                f"{index} names {file!r}, which is outside its own folder; do not use this "
                "checkpoint."
            )
    for file in sorted(set(weight_map.values())):
        if not (directory / file).is_file():
            raise UserError(
                f"{directory / file} is missing, but {index.name} names it; copy or download it."
            )
        headers[file] = read(directory / file)
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise UserError(
                f"{directory / file} contains no {name}, although {index.name} says so; download "
                "it again."
            )
    return {name: headers[file][name] for name, file in weight_map.items()}


def _nothing_there(directory: Path) -> str:
    if any(directory.glob("pytorch_model*.bin")):
        return (
            f"{directory} contains .bin weights without pytorch_model.bin.index.json; copy or "
            "download it again."
        )
    if not directory.is_dir():
        return f"{directory} does not exist; give the directory of a checkpoint."
    return (
        f"{directory} contains neither {SINGLE_FILE} nor {INDEX_FILE}; give the directory of a "
        "checkpoint."
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `UserError` if the file is missing or contains something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; give the whole directory of a Hugging Face model."
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy or download it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; copy or download it again.")
    return value
