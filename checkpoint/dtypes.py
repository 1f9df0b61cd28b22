"""The types of safetensors in numpy; bfloat16, which numpy lacks, is held as its bits in uint16."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from cpt_merge.core.errors import UserError

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Dtype = Literal["bfloat16", "float16", "float32"]

# type name in a safetensors header -> how its elements are held in numpy
STORED: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("<i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("<u1"),
    "BOOL": np.dtype("?"), "F8_E4M3": np.dtype("<u1"), "F8_E5M2": np.dtype("<u1"),
    "F8_E4M3FNUZ": np.dtype("<u1"), "F8_E5M2FNUZ": np.dtype("<u1"), "F8_E8M0": np.dtype("<u1"),
    "C64": np.dtype("<c8"),
}  # fmt: skip

PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # types that share bytes; never read

FLOATS = ("F32", "F16", "BF16")  # the types of arithmetic; all widen to float32 exactly

# type name in a config.json or a recipe -> in a safetensors header
TORCH_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


# type -> the exponent's bits, all set in NaN and Inf only, and the integers that hold an element
_EXPONENT = {
    "F32": (0x7F80_0000, np.uint32), "F16": (0x7C00, np.uint16), "BF16": (0x7F80, np.uint16),
}  # fmt: skip


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """The size of a tensor in a file. Raises `KeyError` for an unknown type."""
    bits = PACKED_BITS.get(dtype) or 8 * STORED[dtype].itemsize
    return math.prod(shape) * bits // 8


def widen(stored: Array, dtype: str) -> Float32:
    """Stored elements of one of `FLOATS` as float32; exact."""
    if dtype == "BF16":
        wide: Float32 = stored.view(bfloat16).astype(np.float32)
        return wide
    if dtype not in FLOATS:
        raise UserError(
            f"type {dtype} is not supported in arithmetic; convert the checkpoint to bfloat16."
        )
    return stored.astype(np.float32)


def narrow(values: Float32, dtype: str) -> Array:
    """float32 rounded to the nearest element of one of `FLOATS`, ties to even.

    NaN stays NaN, overflow becomes Inf.
    """
    if dtype not in FLOATS:
        raise UserError(
            f"float32 cannot be stored as {dtype}; choose bfloat16, float16 or float32."
        )
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "BF16":
            return values.astype(bfloat16).view(np.uint16)
        return values.astype(STORED[dtype])


def rounded(values: Float32, dtype: str, name: str) -> Array:
    """`narrow` of finite values (invariant "one rounding"). Raises `UserError` for NaN and Inf."""
    narrowed = narrow(values.reshape(-1), dtype)
    if is_finite(narrowed, dtype):
        return narrowed
    if not np.isfinite(values).all():
        raise UserError(f"{name} would hold NaN or Inf; one of the models is damaged.")
    if dtype == "F16":
        raise UserError(f"{name} has values beyond float16's 65504; choose dtype: bfloat16.")
    raise UserError(f"{name} has values beyond bfloat16's 3.39e38; one of the models is damaged.")


def is_finite(stored: Array, dtype: str) -> bool:
    """Whether no stored element of one of `FLOATS` is NaN or Inf."""
    exponent, bits = _EXPONENT[dtype]
    return int(np.bitwise_and(stored.view(bits), exponent).max(initial=0)) < exponent
