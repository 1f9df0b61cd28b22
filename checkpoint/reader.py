"""Read a Hugging Face checkpoint lazily: first the headers, then any rows of any tensor.

Neither torch nor a model is needed for safetensors; .bin files need torch for their headers.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt_merge.checkpoint.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    MERGE_IT,
    adapted_tensors,
    check_adapter,
    find_base,
    is_adapter,
)
from cpt_merge.checkpoint.derived import DerivedInfo
from cpt_merge.checkpoint.dtypes import STORED, Array, Float32, rounded, widen
from cpt_merge.checkpoint.headers import StridedInfo, TensorInfo, read_header
from cpt_merge.checkpoint.pickled import read_pickled
from cpt_merge.checkpoint.plain_names import plain_name, plain_names
from cpt_merge.checkpoint.quantised import (
    plain_config,
    plain_tensors,
    refuse_transformed,
    states_method,
)
from cpt_merge.checkpoint.text_sections import resize_config
from cpt_merge.core.artifact import read_marker
from cpt_merge.core.errors import UserError
from cpt_merge.core.foreign_formats import describe_file, describe_folder, refuse_pointer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_WEIGHTS = (
    SINGLE_FILE, INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip


@dataclass
class Checkpoint:
    """The weights of a directory, safetensors or .bin. Several threads may read at once."""

    directory: Path
    tensors: dict[str, TensorInfo]
    unchanged_files: frozenset[str]  # those that contain `tensors` as they are, and nothing else
    adapted: Checkpoint | None = None  # the base model, if the directory holds an adapter
    stated: Mapping[str, Any] | None = None  # a config.json in place of the directory's
    _files: dict[str, FileIO] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @staticmethod
    def open(directory: Path, stem: str = "model", base: Path | None = None) -> Checkpoint:
        """Read and check the headers of the files whose names begin with `stem`.

        Quantised weights are read as float32, and a LoRA adapter with the model that it belongs to:
        the one that it names, else `base`. Raises `UserError` that names a missing or damaged file,
        or what is not understood here.
        """
        directory = Path(directory)
        if stem == "model" and is_adapter(directory):
            return _open_adapter(directory, base)
        path = directory / "config.json"
        config = read_json(path) if path.is_file() else {}
        refuse_transformed(directory, config)
        stored = stored_tensors(directory, stem)
        _check_gathered(directory, stored)
        tensors = plain_tensors(directory, plain_names(directory, stored), config)
        return Checkpoint(directory, tensors, _unchanged_files(stored, tensors))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json, without quantisation.

        Raises `UserError` if it is missing or damaged.
        """
        if self.stated is not None:
            return dict(self.stated)
        if self.adapted is None:
            return plain_config(read_json(self.directory / "config.json"))
        config = self.adapted.config
        for name, info in self.tensors.items():
            of_base = self.adapted.tensors.get(name)
            if of_base is not None and info.shape[:1] != of_base.shape[:1]:
                config = resize_config(config, info.shape[0])
        return config

    @property
    def directories(self) -> list[Path]:
        """Where its files are; of files with the same name, the first one counts."""
        return [self.directory, *(self.adapted.directories if self.adapted else [])]

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
        return self._elements(info, start, stop)

    def read_copied(self, name: str, start: int, stop: int) -> Array:
        """`read_flat` in the type in which copies are written (`TensorInfo.copied_dtype`)."""
        info, values = self.info(name), self.read_flat(name, start, stop)
        if info.copied_dtype == info.dtype:
            return values
        return rounded(values, info.copied_dtype, name)

    def _elements(self, info: TensorInfo, start: int, stop: int) -> Array:
        """Elements of a tensor of `tensors`, or of a part of one."""
        if isinstance(info, DerivedInfo):
            return info.compute(self._elements, start, stop)
        if isinstance(info, StridedInfo):
            mapped = np.memmap(self.directory / info.file, mode="r")
            elements: Array = np.ndarray(
                info.shape, STORED[info.dtype], mapped, info.offset, info.strides
            )
            return elements.ravel() if stop - start == info.size else elements.flat[start:stop]
        values = np.empty(stop - start, STORED[info.dtype])
        view = values.view(np.uint8).data
        offset, file = info.offset + start * values.itemsize, self._file(info.file)
        while view:
            count = os.preadv(file.fileno(), [view], offset)
            if count == 0:
                raise UserError(
                    f"{self.directory / info.file} ends within {info.name}; copy or download it "
                    "again."
                )
            view, offset = view[count:], offset + count
        return values

    def expect(self, name: str, start: int, stop: int) -> None:
        """Ask the operating system to fetch elements [start, stop), which will be read soon."""
        info = self.info(name)
        if isinstance(info, DerivedInfo):
            return
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


def stored_tensors(directory: Path, stem: str = "model") -> dict[str, TensorInfo]:
    """The tensors that the files of a checkpoint contain, by the names that they have there.

    Raises `UserError` that names a missing or damaged file.
    """
    if read_marker(directory) is not None:
        raise UserError(f"{directory} was never finished; run the command that writes it again.")
    single, index = directory / f"{stem}.safetensors", directory / index_file(stem)
    if single.is_file():
        stored = read_header(single)
        _refuse_stray(single, index, stored)
        return stored
    if index.is_file():
        return _read_indexed(index)
    pickled = directory / f"pytorch_{stem}.bin"
    if pickled.is_file():
        return read_pickled(pickled)
    pickled_index = directory / f"pytorch_{stem}.bin.index.json"
    if pickled_index.is_file():
        return _read_indexed(pickled_index, read_pickled)
    raise UserError(_nothing_there(directory))


def _open_adapter(directory: Path, at_hand: Path | None) -> Checkpoint:
    """A LoRA adapter as the whole model that it makes of its base."""
    whole = [name for name in _WEIGHTS if (directory / name).is_file()]
    if whole:
        raise UserError(
            f"{directory} contains a whole model ({whole[0]}) and an adapter ({ADAPTER_CONFIG}); "
            "remove the one that you do not mean."
        )
    config = read_json(directory / ADAPTER_CONFIG)
    check_adapter(directory, config)
    files = [directory / name for name in ADAPTER_FILES if (directory / name).is_file()]
    if not files:
        raise UserError(
            f"{directory} contains {ADAPTER_CONFIG} but no {ADAPTER_FILES[0]}; copy or download it "
            "again."
        )
    read = read_header if files[0].suffix == ".safetensors" else read_pickled
    base = Checkpoint.open(find_base(directory, config, at_hand))
    of_base = {name: _moved(info, base.directory) for name, info in base.tensors.items()}
    tensors = adapted_tensors(directory, config, read(files[0]), of_base)
    return Checkpoint(directory, tensors, frozenset(), base)


def _moved(info: TensorInfo, directory: Path) -> TensorInfo:
    """The same tensor, read from anywhere."""
    moved = replace(info, file=str(directory.resolve() / info.file))
    if isinstance(moved, DerivedInfo):
        return replace(moved, parts=tuple(_moved(part, directory) for part in moved.parts))
    return moved


def _check_gathered(directory: Path, stored: Mapping[str, TensorInfo]) -> None:
    """Raise `UserError` for what ZeRO-3 leaves of a model that it does not gather."""
    empty = [name for name, info in stored.items() if info.size == 0]
    if empty and (directory / "zero_to_fp32.py").is_file():
        raise UserError(
            f"{directory} contains {empty[0]} without elements, because DeepSpeed's ZeRO-3 keeps "
            f"them elsewhere; run `python {directory}/zero_to_fp32.py {directory} OUT "
            "--safe_serialization`."
        )


def check_complete(directory: Path) -> None:
    """Raise `UserError` unless the directory is a model that transformers can load by its names.

    It may be quantised: transformers knows methods that are not dequantised here.
    """
    refuse_adapter(directory)
    if (directory / "generation_config.json").is_file():
        read_json(directory / "generation_config.json")  # the merge needs it at the very end
    stored, config = stored_tensors(directory), read_json(directory / "config.json")
    if not states_method(config):
        for name, info in plain_tensors(directory, stored, config).items():
            if isinstance(info, DerivedInfo):
                raise UserError(
                    f"{directory} contains {name} in quantised form, but its config.json does not "
                    "say so, and transformers would not scale it; restore quantization_config."
                )
    odd = next((name for name in stored if name != plain_name(name)), None)
    if odd is not None:
        raise UserError(
            f"{directory} was saved with its wrapper ({odd}), and transformers does not find such "
            f"names; save the model without it, so that this tensor is {plain_name(odd)}."
        )


def refuse_adapter(directory: Path) -> None:
    """Raise `UserError` if the directory holds an adapter instead of a model."""
    if is_adapter(directory):
        raise UserError(
            f"{directory} is a LoRA adapter, which only merge-models and extract-vector read; "
            f"{MERGE_IT}."
        )


def _unchanged_files(
    stored: Mapping[str, TensorInfo], tensors: Mapping[str, TensorInfo]
) -> frozenset[str]:
    changed = {info.file for name, info in stored.items() if tensors.get(name) is not info}
    return frozenset({info.file for info in stored.values()} - changed)


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


def _refuse_stray(single: Path, index: Path, stored: Mapping[str, TensorInfo]) -> None:
    """Raise `UserError` if a complete index beside the single file names other tensors."""
    listed = read_json(index).get("weight_map") if index.is_file() else None
    if not isinstance(listed, dict) or listed.keys() == stored.keys():
        return
    shards = {str(file) for file in listed.values()} - {single.name}
    if shards and all((single.parent / file).is_file() for file in shards):
        other = min(listed.keys() ^ stored.keys())
        raise UserError(
            f"{single.parent} contains both {single.name}, which loaders read, and the shards of "
            f"{index.name}, and only one of them has {other}; remove the one that is out of date "
            f"({single}, or {index.name} with its shards)."
        )


def unlisted_in(directory: Path, name: str) -> str | None:
    """The shard that holds a tensor that the index does not list, if there is one."""
    index = directory / INDEX_FILE
    if (directory / SINGLE_FILE).is_file() or not index.is_file():
        return None
    files = sorted({str(file) for file in read_json(index).get("weight_map", {}).values()})
    return next((file for file in files if name in read_header(directory / file)), None)


def _nothing_there(directory: Path) -> str:
    if any(directory.glob("pytorch_model*.bin")):
        return (
            f"{directory} contains .bin weights without pytorch_model.bin.index.json; copy or "
            "download it again."
        )
    if directory.is_file():
        return describe_file(directory)
    if not directory.is_dir():
        return f"{directory} does not exist; give the directory of a checkpoint."
    return describe_folder(directory) or (
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
        refuse_pointer(path)
        raise UserError(f"{path} cannot be read ({error}); copy or download it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; copy or download it again.")
    return value
