"""Safetensors' types in numpy. bfloat16, which numpy lacks, is held as its bits in uint16: half of a float32."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cpt_merge.core.errors import UserError

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Dtype = Literal["bfloat16", "float16", "float32"]

STORED: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("<i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("<u1"),
    "BOOL": np.dtype("?"), "F8_E4M3": np.dtype("<u1"), "F8_E5M2": np.dtype("<u1"),
}  # fmt: skip
"""Type name in a safetensors header -> how its elements are held in numpy."""

FLOATS = ("F32", "F16", "BF16")
"""The types that arithmetic is done on, all widened to float32 exactly."""

TORCH_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Type name in a config.json or a recipe -> in a safetensors header."""


def widen(stored: Array, dtype: str) -> Float32:
    """Elements of one of `FLOATS`, as stored, in float32. Exact."""
    if dtype == "BF16":
        wide = stored.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    if dtype not in FLOATS:
        raise UserError(
            f"type {dtype} cannot be computed with; convert the checkpoint to bfloat16."
        )
    return stored.astype(np.float32)


def narrow(values: Float32, dtype: str, finite: bool = False) -> Array:
    """float32 rounded to the nearest element of one of `FLOATS`, ties to even. NaN stays NaN, overflow becomes Inf.

    `finite` is the caller's word that there is no NaN, and saves looking for one.
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
    """The one rounding. Raises `UserError` where the result is not finite."""
    flat = values.reshape(-1)
    # the sum of squares is finite for all sane values, at a fraction of the cost of looking at each
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
    """The upper half of the bits, after adding just under half of the lower half's range, or half of it if odd.

    The sum carries into the exponent where it should, up to Inf. It must not touch a NaN, whose set bits may all
    lie in the lower half: that becomes the quiet NaN 0x7FC0.
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
