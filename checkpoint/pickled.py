"""Where each tensor of a `pytorch_model.bin` is in the file, so that it is read as safetensors are.

torch.save writes a zip archive: a pickle that describes the tensors, and one uncompressed record
per storage. torch reads the pickle with `weights_only=True` (invariant "no code from strangers")
and maps the file. The addresses of the tensors tell where they are in the file. The mapping is then
closed: elements are read from the file, because pages of a mapping would stay in memory.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from cpt_merge.checkpoint.dtypes import TORCH_NAMES
from cpt_merge.checkpoint.headers import StridedInfo, TensorInfo
from cpt_merge.checkpoint.mapped_files import mapping_start
from cpt_merge.core.errors import UserError
from cpt_merge.core.foreign_formats import refuse_pointer

if TYPE_CHECKING:
    import torch

TYPES = {  # torch's name of a type -> its name in a safetensors header
    **TORCH_NAMES, "float64": "F64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "bool": "BOOL",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
}  # fmt: skip

_ZIP_START = b"PK\x03\x04"
# raised by zipfile and by this module for a damaged file
_DAMAGED = (ValueError, zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError)


def read_pickled(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one .bin file. Raises `UserError` if it is damaged or has other contents."""
    try:
        _check_archive(path)
        entries, size = _load(path), path.stat().st_size
        filled = next((tensor for tensor in entries.values() if tensor.numel()), None)
        start = 0 if filled is None else mapping_start(filled.data_ptr())
        return {
            name: _locate(path.name, name, tensor, start, size) for name, tensor in entries.items()
        }
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except _DAMAGED as error:
        raise UserError(
            f"{path} is not a complete file of tensors ({_first_line(error)}); copy or download it "
            "again."
        ) from None


def _check_archive(path: Path) -> None:
    """Raises `UserError` for what torch cannot map, `ValueError` for what it would misread."""
    refuse_pointer(path)
    with open(path, "rb") as file:
        if file.read(len(_ZIP_START)) != _ZIP_START:
            raise UserError(
                f"{path} is not a zip archive, which torch.save writes since torch 1.6; if it is "
                "older, load it with transformers and save it as safetensors, otherwise copy or "
                "download it again."
            )
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its record {record.filename} is compressed")
            if record.filename.endswith("/byteorder") and archive.read(record) != b"little":
                raise ValueError("it was written on a big-endian machine")


def _load(path: Path) -> dict[str, torch.Tensor]:
    """The mapped tensors. Raises `UserError` for other contents, `ValueError` for damage."""
    import torch

    try:
        entries = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{path} asks for {asked[1] if asked else 'more'} in addition to tensors, and loading "
            "that could run code; do not load it, get the model as safetensors."
        ) from None
    except OSError:
        raise
    except Exception as error:  # a broken pickle may raise anything
        raise ValueError(_first_line(error)) from None
    if not isinstance(entries, dict):
        raise ValueError(f"it holds a {type(entries).__name__}, not tensors by name")
    for name, value in entries.items():
        if not isinstance(name, str) or type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise UserError(
                f"{path} contains {name!r} of type {type(value).__name__}, which is not a named "
                "tensor; load it with transformers and save it as safetensors."
            )
        if _type_name(value) not in TYPES:
            raise UserError(
                f"{path} contains {name} as {_type_name(value)}, which this program does not read; "
                "convert it to bfloat16."
            )
    return entries


def _type_name(tensor: torch.Tensor) -> str:
    """torch's name of the type. Tensors that are not plain arrays in memory get a longer name."""
    layout, dtype = str(tensor.layout), str(tensor.dtype).removeprefix("torch.")
    if layout != "torch.strided":
        return f"{layout.removeprefix('torch.')} {dtype}"
    if tensor.device.type != "cpu":
        return f"{tensor.device.type} {dtype} without values"
    return f"negated {dtype}" if tensor.is_neg() else dtype


def _locate(file: str, name: str, tensor: torch.Tensor, start: int, size: int) -> TensorInfo:
    """Where a tensor is in a file of `size` bytes that is mapped at `start`."""
    dtype, shape, itemsize = TYPES[_type_name(tensor)], tuple(tensor.shape), tensor.element_size()
    if tensor.numel() == 0:
        return TensorInfo(name, dtype, shape, file, 0, 0)
    offset = tensor.data_ptr() - start
    strides = tuple(stride * itemsize for stride in tensor.stride())
    lengths = zip(shape, strides, strict=True)
    extent = itemsize + sum((length - 1) * stride for length, stride in lengths)
    if not 0 <= offset <= size - extent:
        raise ValueError(f"{name} is not in it")
    if tensor.is_contiguous():
        return TensorInfo(name, dtype, shape, file, offset, extent)
    return StridedInfo(name, dtype, shape, file, offset, tensor.numel() * itemsize, strides)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160].rstrip(".")
