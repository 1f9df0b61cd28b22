"""The types of safetensors in numpy; bfloat16, which numpy lacks, is held as its bits in uint16."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
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
}  # fmt: skip

FLOATS = ("F32", "F16", "BF16")  # the types of arithmetic; all widen to float32 exactly

# type name in a config.json or a recipe -> in a safetensors header
TORCH_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def widen(stored: Array, dtype: str) -> Float32:
    """Stored elements of one of `FLOATS` as float32; exact."""
    if dtype == "BF16":
        wide = stored.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    if dtype not in FLOATS:
        raise UserError(
            f"type {dtype} is not supported in arithmetic; convert the checkpoint to bfloat16."
        )
    return stored.astype(np.float32)


def narrow(values: Float32, dtype: str, finite: bool = False) -> Array:
    """float32 rounded to the nearest element of one of `FLOATS`, ties to even.

    NaN stays NaN, overflow becomes Inf. With `finite`, the caller promises that there is no NaN.
    """
    if dtype == "BF16":
        return _to_bfloat16(values, finite)
    if dtype not in FLOATS:
        raise UserError(
            f"float32 cannot be stored as {dtype}; choose bfloat16, float16 or float32."
        )
    with np.errstate(over="ignore"):
        return values.astype(STORED[dtype])


def rounded(values: Float32, dtype: str, name: str) -> Array:
    """`narrow` of finite values (invariant "one rounding"). Raises `UserError` for NaN and Inf."""
    flat = values.reshape(-1)
    # the sum of squares is finite for all sane values, and much cheaper than a test of each
    sane = math.isfinite(float(np.dot(flat, flat)))
    if not (sane or np.isfinite(flat).all()):
        raise UserError(f"{name} would hold NaN or Inf; one of the models is damaged.")
    narrowed = narrow(flat, dtype, finite=True)
    if dtype == "F16" and not np.isfinite(narrowed).all():
        raise UserError(f"{name} has values beyond float16's 65504; choose dtype: bfloat16.")
    if not sane and dtype == "BF16" and bool(((narrowed & 0x7FFF) == 0x7F80).any()):
        raise UserError(
            f"{name} has values beyond bfloat16's 3.39e38; one of the models is damaged."
        )
    return narrowed


def _to_bfloat16(values: Float32, finite: bool) -> NDArray[np.uint16]:
    """The upper 16 bits after adding 0x7FFF, or 0x8000 if the upper half is odd.

    The sum carries into the exponent where it should, up to Inf. A NaN, whose set bits may all be
    in the lower half, becomes the quiet NaN 0x7FC0 instead.
    """
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    narrowed = rounded.astype(np.uint16)
    if not finite:
        narrowed[np.isnan(values)] = 0x7FC0
    return narrowed
