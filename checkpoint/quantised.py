"""Quantised checkpoints: which are dequantised on the fly, and how the others are recognised.

DeepSeek, Qwen and others publish weights in 8-bit floats with a scale for each block of 128 x 128
elements (or for each row, or one for all); gpt-oss publishes those of its experts in MXFP4, 4-bit
floats with a scale for each 32. Both are computed in float32 when they are read. Formats with
integers need the code that wrote them, so they are refused by name. The tensors decide, because
config.json may not say it, or still say it after the weights were dequantised.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cpt_merge.checkpoint.derived import DerivedInfo, ReadElements, window
from cpt_merge.checkpoint.dtypes import FLOATS, PACKED_BITS, TORCH_NAMES, Array, Float32, widen
from cpt_merge.checkpoint.headers import TensorInfo
from cpt_merge.checkpoint.text_sections import TEXT_SECTIONS
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import counted, say_once

CONFIG_KEYS = ("quantization_config", "compression_config")

_FP8_BLOCK = (128, 128)  # where config.json does not say it
_MX_GROUP = 32  # elements of a scale in MXFP4; two elements in a byte


@dataclass(frozen=True)
class _Method:
    """A method that is refused: its name, what dequantises it, and how its tensors are named."""

    name: str
    tool: str
    marks: re.Pattern[str] | None = None


_TRANSFORMERS = "transformers (`AutoModelForCausalLM.from_pretrained(DIR).dequantize()`)"

_REFUSED = {  # `quant_method` in config.json; the first whose marks are found decides
    "bitsandbytes": _Method("bitsandbytes", _TRANSFORMERS, re.compile(
        r"\.(SCB|weight_format)$|\.(nested_)?(absmax|quant_map)$|\.quant_state\.bitsandbytes__\w+$")),
    "gptq": _Method("GPTQ", "GPTQModel", re.compile(r"\.g_idx$")),
    "awq": _Method("AWQ", "GPTQModel"),
    "packed": _Method("AWQ or GPTQ", "GPTQModel", re.compile(r"\.(qweight|qzeros)$")),
    "exl2": _Method("EXL2 or EXL3", "the exllama project's converter", re.compile(
        r"\.(q_invperm|q_scale_max|trellis)$")),
    "hqq": _Method("HQQ", "hqq", re.compile(r"\.W_q$")),
    "aqlm": _Method("AQLM", "aqlm", re.compile(r"\.codebooks$")),
    "vptq": _Method("VPTQ", "vptq", re.compile(r"\.centroids\.")),
    "quip": _Method("QuIP#", "quip-sharp", re.compile(r"\.Qidxs$")),
    "spqr": _Method("SpQR", "spqr_quant", re.compile(r"\.dense_weights$")),
    "higgs": _Method("HIGGS", _TRANSFORMERS, re.compile(r"\.tables2$")),
    "eetq": _Method("EETQ", "EETQ", re.compile(r"\.weight_scales$")),
    "quanto": _Method("quanto", "optimum-quanto", re.compile(r"\.weight\._(data|scale|packed)\b")),
    "torchao": _Method("torchao", "torchao", re.compile(r"\.weight:\w+$|\._weight_\w+$")),
    "nvfp4": _Method("NVFP4", "NVIDIA's Model Optimizer or compressed-tensors", re.compile(
        r"\.weight_(scale_2|global_scale)$")),
    "compressed-tensors": _Method("compressed-tensors", "compressed-tensors "
        "(`CompressedTensorsConfig(run_compressed=False)` in transformers)", re.compile(
        r"\.(weight_packed|weight_shape|weight_zero_point)$|\.(bitmask|compressed)$")),
    "bitnet": _Method("BitNet", "nothing; it needs training of its own"),
    "fp_quant": _Method("FP-Quant", "fp_quant", re.compile(r"\.(dqweight|forward_hadamard\w*)$")),
    "sinq": _Method("SINQ", "sinq"),
    "auto-round": _Method("AutoRound", "auto-round"),
    "quark": _Method("Quark", "AMD's Quark"),
    "modelopt": _Method("ModelOpt", "NVIDIA's Model Optimizer"),
}  # fmt: skip

_DEQUANTISED = {"fp8", "mxfp4"}
_MAY_BE_FP8 = {"compressed-tensors", "modelopt", "quark"}

# computed in another way than the plain weights say, even if these are stored
_NEVER_PLAIN = {"bitnet", "fp_quant", "torchao"}

# scales of activations and of the KV cache, which plain weights do without
_ACTIVATION_SCALE = re.compile(
    r"[._](input|activation|output|q|k|v|kv|prob)_scale(_inv)?$|\.input_global_scale$"
)


# --- values of the small types ---


def _float8(exponent_bits: int) -> Float32:
    """The 256 values of F8_E4M3 or F8_E5M2 in float32, where each is exact."""
    bits = np.arange(256)
    mantissa_bits = 7 - exponent_bits
    exponent, mantissa = (bits & 0x7F) >> mantissa_bits, bits & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    fraction = mantissa / (1 << mantissa_bits) + (exponent > 0)
    values = np.ldexp(fraction, np.maximum(exponent, 1) - bias)
    if exponent_bits == 5:
        values[exponent == 31] = np.where(mantissa[exponent == 31], np.nan, np.inf)
    else:
        values[(bits & 0x7F) == 0x7F] = np.nan
    signed: Float32 = np.copysign(values, np.where(bits & 0x80, -1, 1)).astype(np.float32)
    return signed


FLOAT8 = {"F8_E4M3": _float8(4), "F8_E5M2": _float8(5)}

_POWERS = np.ldexp(1.0, np.minimum(np.arange(256), 254) - 127).astype(np.float32)  # of F8_E8M0
_POWERS[255] = np.nan

_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4 = np.concatenate([_FP4, -_FP4])
# the two values of a byte, low half first, as the bits of one element: gathered at once
_FP4_PAIRS = np.stack([np.tile(_FP4, 16), np.repeat(_FP4, 16)], axis=1).view(np.uint64).ravel()


def _scale_values(stored: Array, dtype: str) -> Float32:
    """Scales in float32; bytes are exponents of two."""
    values: Float32 = widen(stored, dtype) if dtype in FLOATS else _POWERS[stored]
    return values


# --- derived tensors ---


@dataclass(frozen=True)
class ScaledInfo(DerivedInfo):
    """8-bit floats times the scale of their block; `parts` are the weight and its scales.

    A block has `block` elements of the last two dimensions; the last block may be smaller.
    """

    block: tuple[int, int]

    def rows(self, read: ReadElements, first: int, last: int) -> Float32:
        """The product in float32."""
        weight, scales = self.parts
        height, width = self.shape[-2:]
        down, across = (
            -(-size // block) for size, block in zip((height, width), self.block, strict=True)
        )
        stored = read(weight, first * width, last * width)
        values = FLOAT8[weight.dtype][stored].reshape(-1, width)
        numbers = np.arange(first, last)
        of_row = numbers // height * down + numbers % height // self.block[0]
        begin, end = int(of_row[0]), int(of_row[-1]) + 1
        grid = _scale_values(read(scales, begin * across, end * across), scales.dtype)
        factors = grid.reshape(-1, across)[of_row - begin]
        values *= np.repeat(factors, self.block[1], axis=1)[:, :width] if across > 1 else factors
        return values


@dataclass(frozen=True)
class Mxfp4Info(DerivedInfo):
    """Experts in MXFP4: `parts` are bytes (expert, column, group, 16) and scales (expert, column,
    group). Transformers gives the tensor the shape (expert, row, column).
    """

    def rows(self, read: ReadElements, first: int, last: int) -> Float32:
        """Rows of several experts are joined."""
        height = self.shape[1]
        found = []
        while first < last:
            expert, row = divmod(first, height)
            count = min(height - row, last - first)
            found.append(self._rows_of_expert(read, expert, row, row + count))
            first += count
        return np.concatenate(found)

    def _rows_of_expert(self, read: ReadElements, expert: int, first: int, last: int) -> Float32:
        groups = (first // _MX_GROUP, -(-last // _MX_GROUP))
        here = ((expert, expert + 1), (0, self.width), groups)
        blocks, scales = self.parts
        packed, exponents = window(blocks, *here, (0, _MX_GROUP // 2)), window(scales, *here)
        shape = (self.width, groups[1] - groups[0])
        pairs = _FP4_PAIRS[read(packed, 0, packed.size)]
        values: Float32 = pairs.view(np.float32).reshape(*shape, _MX_GROUP)
        values *= _POWERS[read(exponents, 0, exponents.size)].reshape(*shape, 1)
        start = groups[0] * _MX_GROUP
        return values.reshape(self.width, -1).T[first - start : last - start]


# --- what a checkpoint is ---


def plain_tensors(
    directory: Path, stored: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint as plain floats, by their names without quantisation.

    Raises `UserError` for a method that is not dequantised here.
    """
    quantisation = _quantisation(config)
    method = _method_name(quantisation)
    for key, refused in _REFUSED.items():
        found = next((name for name in stored if refused.marks and refused.marks.search(name)), "")
        if found:
            _refuse(directory, method if method in _REFUSED else key, stored[found])
    own_type = _own_type(config, stored.values())
    tensors, used = dict[str, TensorInfo](), set[str]()
    for name, info in stored.items():
        found_parts = _parts(name, stored)
        if found_parts is None:
            continue
        plain, part = found_parts
        used |= {name, part.name}
        tensors[plain] = _derived(directory, plain, (info, part), own_type, quantisation)
    left = {name: info for name, info in stored.items() if name not in used}
    _check_plain(directory, left, method)
    if tensors:
        scales = [name for name in left if _ACTIVATION_SCALE.search(name)]
        left = {name: info for name, info in left.items() if name not in scales}
        more = f", without {len(scales)} scales of activations" if scales else ""
        found = counted(len(tensors), "quantised tensor")
        say_once(f"model {directory}: {found} read as float32{more}")
    elif method:
        say_once(
            f"model {directory}: config.json names quantisation with {method}, but the weights are "
            "plain floats; the key is ignored"
        )
    return left | tensors


def refuse_transformed(directory: Path, config: Mapping[str, Any]) -> None:
    """Raise `UserError` for methods with which not even plain weights are the model's.

    Their files may hold more than tensors, so this comes before they are read.
    """
    quantisation = _quantisation(config)
    method = _method_name(quantisation)
    if method in _NEVER_PLAIN or quantisation.get("transform_config"):
        _refuse(directory, method)


def states_method(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that the model is quantised."""
    return bool(_quantisation(config))


def refuse_by_config(name: str, config: Mapping[str, Any]) -> None:
    """Raise `UserError` if a model's config.json names a method that is not dequantised here.

    For models of which nothing else is known yet; its weights may turn out to be plain.
    """
    method = _method_name(_quantisation(config))
    if method in _REFUSED and method not in _MAY_BE_FP8:
        _refuse(name, method)


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without what it says about quantisation."""
    return {
        key: plain_config(value) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
        if key not in CONFIG_KEYS
    }


def _quantisation(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in CONFIG_KEYS:
            if isinstance(part.get(key), dict):
                found: Mapping[str, Any] = part[key]
                return found
    return {}


def _method_name(quantisation: Mapping[str, Any]) -> str:
    """The method in lower case; empty if there is none. Old configurations lack its name."""
    method = str(quantisation.get("quant_method") or "").lower()
    if not method and any(quantisation.get(key) for key in ("load_in_4bit", "load_in_8bit")):
        return "bitsandbytes"
    if "bitsandbytes" in method:
        return "bitsandbytes"
    if method == "intel/auto-round":
        return "auto-round"
    return method or ("unknown" if quantisation else "")


def _refuse(directory: Path | str, method: str, found: TensorInfo | None = None) -> NoReturn:
    known = _REFUSED.get(method, _Method(f"the method {method!r}", "the tool that quantised it"))
    evidence = f" (it contains {found.name} as {found.dtype})" if found else ""
    raise UserError(
        f"{directory} is quantised with {known.name}{evidence}; use the 16-bit model that it was "
        f"made from, or dequantise it with {known.tool} and save it."
    )


def _parts(name: str, stored: Mapping[str, TensorInfo]) -> tuple[str, TensorInfo] | None:
    """The plain name and the scales of a quantised tensor; None for any other."""
    info = stored[name]
    if name.endswith("_blocks") and info.dtype == "U8":
        plain = name.removesuffix("_blocks")
        scales = stored.get(f"{plain}_scales")
        return (plain, scales) if scales else None
    if info.dtype not in FLOAT8 or name.endswith(("_scale", "_scale_inv", ".scale")):
        return None
    for scale in (f"{name}_scale_inv", f"{name}_scale", f"{name.removesuffix('.weight')}.scale"):
        if scale in stored:
            return name, stored[scale]
    return None


def _derived(
    directory: Path, plain: str, parts: tuple[TensorInfo, TensorInfo], own_type: str,
    quantisation: Mapping[str, Any],
) -> DerivedInfo:  # fmt: skip
    """Raises `UserError` if the shapes of a weight and its scales do not fit."""
    weight, scales = parts
    size = weight.nbytes + scales.nbytes
    if weight.dtype == "U8":
        experts, columns, groups, length = weight.shape if len(weight.shape) == 4 else (0, 0, 0, 0)
        fits = length == _MX_GROUP // 2 and scales.shape == weight.shape[:3]
        if fits and scales.dtype in ("U8", "F8_E8M0"):
            shape = (experts, groups * _MX_GROUP, columns)
            return Mxfp4Info(plain, "F32", shape, weight.file, 0, size, own_type, parts)
    elif scales.dtype in (*FLOATS, "U8", "F8_E8M0"):
        grid = _grid(weight.shape, scales)
        given = quantisation.get("weight_block_size") or _FP8_BLOCK
        blocks = [
            _block(length, count, size)
            for length, count, size in zip(weight.shape[-2:], grid[-2:], given, strict=True)
        ]
        if len(weight.shape) > 1 and grid[:-2] == weight.shape[:-2] and all(blocks):
            block = (blocks[0] or 1, blocks[1] or 1)
            return ScaledInfo(
                plain, "F32", weight.shape, weight.file, 0, size, own_type, parts, block
            )
    raise UserError(
        f"{directory} contains {weight.name} as {weight.dtype} {weight.shape}, which {scales.name} "
        f"as {scales.dtype} {scales.shape} does not scale; dequantise the model with the tool that "
        "quantised it."
    )


def _grid(shape: tuple[int, ...], scales: TensorInfo) -> tuple[int, ...]:
    """The shape of the scales, with as many dimensions as the weight."""
    if scales.size == 1:
        return (1,) * len(shape)
    if len(scales.shape) == 1 and len(shape) == 2:
        return (scales.size, 1)  # one for each row
    return scales.shape


def _block(length: int, count: int, given: int) -> int | None:
    """How many of `length` elements share one of `count` scales; `given` is what is expected."""
    if -(-length // given) == count:
        return given
    if count and length % count == 0:
        return length // count
    return None


def _check_plain(directory: Path, tensors: Mapping[str, TensorInfo], method: str) -> None:
    """Raise `UserError` for a tensor that is neither plain nor understood."""
    for name, info in tensors.items():
        scale = name.endswith(("weight_scale_inv", "_proj_scale_inv"))
        packed = name.endswith((".weight", "_proj", "_blocks")) and len(info.shape) > 1
        integer = info.dtype[0] in "IU"
        small = info.dtype.startswith("F8") or info.dtype in PACKED_BITS
        if scale:
            raise UserError(
                f"{directory} contains {name}, a scale of 8-bit weights, without such a weight; "
                "the model was converted only in part: get it again."
            )
        if method and method not in _DEQUANTISED and packed and integer:
            _refuse(directory, method, info)
        if (packed and integer) or (small and not _ACTIVATION_SCALE.search(name)):
            reason = "without the scales that belong to it" if info.dtype in FLOAT8 else "quantised"
            raise UserError(
                f"{directory} contains {name} as {info.dtype}, {reason}; use the 16-bit model that "
                "it was made from, or dequantise it with the tool that quantised it."
            )


def _own_type(config: Mapping[str, Any], tensors: Iterable[TensorInfo]) -> str:
    """The type of the model: as config.json says, else that of most plain tensors."""
    for part in (config, *(config.get(name) or {} for name in TEXT_SECTIONS)):
        for key in ("torch_dtype", "dtype"):
            if part.get(key) in TORCH_NAMES:
                return TORCH_NAMES[part[key]]
    counts = Counter(
        info.dtype for info in tensors if info.dtype in FLOATS and "scale" not in info.name
    )
    return counts.most_common(1)[0][0] if counts else "BF16"
