"""Where the tensors of a safetensors file are.

The format: 8 bytes (length n, little endian), n bytes of JSON
`{name: {dtype, shape, data_offsets}}`, data.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.dtypes import PACKED_BITS, STORED, stored_bytes
from cpt_merge.core.errors import UserError
from cpt_merge.core.foreign_formats import refuse_pointer

_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is stored: `nbytes` bytes at `offset` of `file`, row after row."""

    name: str
    dtype: str  # as in the header: BF16, F32, ...
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def row_size(self) -> int:
        """Number of elements in one row of dimension 0 (a scalar is one row)."""
        return math.prod(self.shape[1:])

    @property
    def copied_dtype(self) -> str:
        """The type in which a copy of the tensor is written."""
        return self.dtype

    @property
    def files(self) -> set[str]:
        """The files that hold its elements."""
        return {self.file}


@dataclass(frozen=True)
class StridedInfo(TensorInfo):
    """A tensor whose elements are not contiguous: a transposed view, a slice, an expanded one."""

    strides: tuple[int, ...]  # bytes from an element to the next, per dimension


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, in storage order. Raises `UserError` if it is damaged."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        infos = [
            _tensor_info(path, name, entry, 8 + length, size) for name, entry in header.items()
        ]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        refuse_pointer(path)
        raise UserError(
            f"{path} is not a complete safetensors file ({error}); copy or download it again."
        ) from None
    return {info.name: info for info in sorted(infos, key=lambda info: info.offset)}


def _tensor_info(path: Path, name: str, entry: dict[str, Any], data: int, size: int) -> TensorInfo:
    """One entry of a header. The data starts at byte `data` of a file of `size` bytes."""
    (start, stop), dtype, shape = entry["data_offsets"], entry["dtype"], tuple(entry["shape"])
    if dtype not in STORED and dtype not in PACKED_BITS:
        raise UserError(
            f"{path} stores {name} as {dtype}, a type that this program does not know; convert the "
            "model to bfloat16."
        )
    if any(not isinstance(length, int) or length < 0 for length in shape):
        raise ValueError(f"{name} has the shape {shape}")
    if stop - start != stored_bytes(dtype, shape):
        raise ValueError(f"{name} has {stop - start} bytes, which {dtype} {shape} does not fill")
    if not 0 <= start <= stop or data + stop > size:
        raise ValueError(f"{name} is in bytes {data + start} to {data + stop} of {size}")
    return TensorInfo(name, dtype, shape, path.name, data + start, stop - start)
