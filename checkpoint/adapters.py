"""LoRA adapters: the base model's tensors with the adapter added when they are read.

An adapter of PEFT has two small matrices for each weight that it changes, W + scaling * B @ A, and
whole tensors for modules that were trained themselves. The products are summed in one order without
a matrix library, so their bits do not depend on the parts that are read, or on the processor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cpt_merge.checkpoint.derived import DerivedInfo, ReadElements, transposed
from cpt_merge.checkpoint.dtypes import FLOATS, Array, Float32, widen
from cpt_merge.checkpoint.headers import TensorInfo
from cpt_merge.checkpoint.plain_names import plain_name
from cpt_merge.core.errors import UserError
from cpt_merge.core.hub import is_local, model_directory
from cpt_merge.core.progress import counted, say_once

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

MERGE_IT = (
    "merge it with PEFT (`AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload()`) and "
    "save the model"
)

# fields of adapter_config.json that change what the matrices mean
_OTHER_KINDS = {
    "use_dora": "DoRA", "use_qalora": "QA-LoRA", "use_bdlora": "BD-LoRA", "lora_bias": "lora_bias",
    "alora_invocation_tokens": "activated LoRA", "arrow_config": "Arrow",
    "layer_replication": "layer_replication", "target_parameters": "target_parameters",
    "trainable_token_indices": "trainable_token_indices",
}  # fmt: skip
# with any other initialisation, the adapter belongs to weights that differ from the base's
_OF_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")

_PART = re.compile(r"^(.+)\.lora_(embedding_)?([AB])(?:\.default)?(?:\.weight)?$")
_SAVED_MODULE = re.compile(r"\.modules_to_save(\.default)?(?=\.)|\.base_layer(?=\.)")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.(weight|bias)$")
_HEAD_MATRIX = re.compile(r"(^|\.)(lm_head|embed_out|decoder)\.weight$")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$")
_BODY = re.compile(r"^((model|language_model|text_model|transformer)\.)+")
_QUANTISED_NAME = re.compile(r"(-unsloth)?-bnb-[48]bit$")


@dataclass(frozen=True)
class LowRankInfo(DerivedInfo):
    """A weight, plus `scaling` times the product of two matrices of rank r.

    `parts` are the weight, the left matrix (rows, r) and the right one (r, width).
    """

    scaling: float

    def rows(self, read: ReadElements, first: int, last: int) -> Float32:
        """The sum in float32, one rank after the other; bits stay where nothing is added."""
        base, left, right = self.parts
        rank = right.shape[0]
        columns = widen(read(left, first * rank, last * rank), left.dtype).reshape(-1, rank)
        across = widen(read(right, 0, right.size), right.dtype).reshape(rank, -1)
        delta = np.zeros((last - first, self.width), np.float32)
        term = np.empty_like(delta)
        for number in range(rank):
            np.multiply(columns[:, number, None], across[number], out=term)
            delta += term
        delta *= np.float32(self.scaling)
        stored: Array = read(base, first * self.width, last * self.width)
        weight = widen(stored, base.dtype).reshape(delta.shape)
        return np.where(delta == 0, weight, weight + delta)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter of PEFT."""
    return (directory / ADAPTER_CONFIG).is_file()


def check_adapter(directory: Path, config: Mapping[str, Any]) -> None:
    """Raise `UserError` for adapters that are not plain LoRA."""
    kind = str(config.get("peft_type", "LORA")).upper()
    if kind != "LORA":
        raise UserError(f"{directory} is an adapter of the type {kind}, not LoRA; {MERGE_IT}.")
    others = [name for field, name in _OTHER_KINDS.items() if config.get(field)]
    start = config.get("init_lora_weights")
    if start not in _OF_THE_BASE:
        others.append(f"init_lora_weights: {start}")
    if others:
        raise UserError(
            f"{directory} is a LoRA adapter with {' and '.join(others)}, which is not merged here; "
            f"{MERGE_IT}."
        )


def find_base(directory: Path, config: Mapping[str, Any], at_hand: Path | None) -> Path:
    """The directory of the model that an adapter belongs to.

    It is the one that its configuration names, in this file system or on the hub; if that cannot be
    found, the base `at_hand`, with a message. Raises `UserError` if there is neither.
    """
    name = str(config.get("base_model_name_or_path") or "")
    for path in (Path(name).expanduser(), directory / name, directory.parent / name):
        is_model = (path / "config.json").is_file() or is_adapter(path)
        if name and is_model and path.resolve() != directory.resolve():
            return path
    if at_hand is not None and name and _model_name(Path(name)) in _names(at_hand):
        return at_hand
    if name and not is_local(name):
        try:
            return model_directory(name)
        except UserError as error:
            if at_hand is None:
                raise UserError(f"{directory} is a LoRA adapter of {name}: {error}") from None
    if at_hand is None:
        raise UserError(
            f"{directory} is a LoRA adapter of {name or 'a model that it does not name'}, which is "
            f"not here; correct base_model_name_or_path in its {ADAPTER_CONFIG}."
        )
    say_once(
        f"model {directory}: a LoRA adapter of {name or 'a model that it does not name'}, which "
        f"is not here; it is applied to {at_hand}"
    )
    return at_hand


def _model_name(path: Path) -> str:
    return _QUANTISED_NAME.sub("", path.name.lower())


def _names(directory: Path) -> set[str]:
    """What a model is called: its directory, or the repository in the hub's cache."""
    found = {_model_name(directory), _model_name(directory.resolve())}
    for part in directory.resolve().parts:
        if part.startswith("models--"):
            found.add(_model_name(Path(part.replace("--", "/"))))
    return found


def adapted_tensors(
    directory: Path,
    config: Mapping[str, Any],
    stored: Mapping[str, TensorInfo],
    base: Mapping[str, TensorInfo],
) -> dict[str, TensorInfo]:
    """The base's tensors with the adapter. Raises `UserError` for what does not fit the base."""
    names = _BaseNames(directory, base)
    low_rank: dict[str, dict[str, TensorInfo]] = {}
    tensors = dict(base)
    for stored_name, info in stored.items():
        if info.dtype not in FLOATS:
            raise UserError(f"{directory} contains {stored_name} as {info.dtype}; {MERGE_IT}.")
        name = _SAVED_MODULE.sub("", plain_name(stored_name))
        part = _PART.match(name)
        if part:
            low_rank.setdefault(part[1], {})[f"{part[2] or ''}{part[3]}"] = info
        elif "lora_" in name:
            raise UserError(
                f"{directory} contains {stored_name}, which is not plain LoRA; {MERGE_IT}."
            )
        elif ".original_module." not in name:
            tensors[names.find(name, info.shape)] = info
    replaced = sum(info is not base.get(name) for name, info in tensors.items())
    for module, parts in low_rank.items():
        name = names.find(f"{module}.weight", () if _HEAD.search(f"{module}.weight") else None)
        weight = tensors.get(name) or names.embedding(name)
        tensors[name] = _low_rank(directory, name, weight, parts, config, module)
    tensors |= _head_of_base(config, tensors, base)
    whole = f" and {counted(replaced, 'tensor')} of its own" if replaced else ""
    say_once(f"model {directory}: a LoRA adapter of {counted(len(low_rank), 'weight')}{whole}")
    return tensors


def _head_of_base(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], base: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """The base's embedding as the head, if the adapter trained the embedding alone.

    PEFT computes a tied model's logits with the base's matrix, whether the embedding has a copy
    (`modules_to_save`) or low-rank matrices.
    """
    embedding = next((name for name in base if _EMBEDDING.search(name)), None)
    if (
        embedding is None
        or config.get("ensure_weight_tying")
        or any(map(_HEAD_MATRIX.search, tensors))
    ):
        return {}
    module, trained = embedding.removesuffix(".weight"), tensors[embedding]
    saved = any(module.endswith(str(name)) for name in config.get("modules_to_save") or [])
    alone = isinstance(trained, LowRankInfo) or (saved and trained is not base[embedding])
    if not alone or trained.shape != base[embedding].shape:
        return {}
    head = "embed_out.weight" if module.endswith("embed_in") else "lm_head.weight"
    return {head: replace(base[embedding], name=head)}


class _BaseNames:
    """The base's tensors under the names that an adapter may have for them.

    PEFT takes the model's names; a checkpoint may have other ones before `layers` or `h`.
    """

    def __init__(self, directory: Path, base: Mapping[str, TensorInfo]) -> None:
        self.directory, self.base = directory, base
        self.bodies: dict[str, list[str]] = {}
        for name in base:
            self.bodies.setdefault(_BODY.sub("", name), []).append(name)

    def embedding(self, head: str) -> TensorInfo:
        """The embedding of a tied base, which the adapter changes as a head only."""
        for name, info in self.base.items():
            if _EMBEDDING.search(name):
                return info
        raise UserError(f"{self.directory} changes {head}, but its base model has no embedding.")

    def find(self, name: str, shape: tuple[int, ...] | None) -> str:
        """The base's name.

        A whole tensor, of this shape, may have more rows. A head may be new; without a shape, no
        tensor may.
        """
        found = [name] if name in self.base else self.bodies.get(_BODY.sub("", name), [])
        if not found and shape is not None and _HEAD.search(name):
            return name
        if len(found) != 1:
            raise UserError(
                f"{self.directory} changes {name}, which its base model does not contain; correct "
                f"base_model_name_or_path in its {ADAPTER_CONFIG}."
            )
        of_base = self.base[found[0]].shape
        if shape and shape[1:] != of_base[1:]:
            raise UserError(
                f"{self.directory} contains {name} in shape {shape}, its base model in shape "
                f"{of_base}; correct base_model_name_or_path in its {ADAPTER_CONFIG}."
            )
        return found[0]


def _low_rank(
    directory: Path, name: str, base: TensorInfo, parts: Mapping[str, TensorInfo],
    config: Mapping[str, Any], module: str,
) -> LowRankInfo:  # fmt: skip
    """Raises `UserError` if the matrices do not fit the weight."""
    embedding = "embedding_A" in parts
    first, second = (parts.get(f"{'embedding_' if embedding else ''}{part}") for part in "AB")
    if first is None or second is None:
        raise UserError(
            f"{directory} contains only one of the two matrices of {module}; copy or download it "
            "again."
        )
    left: TensorInfo = second
    right: TensorInfo = first
    rank = first.shape[0] if first.shape else 0
    if len(first.shape) == len(second.shape) == 2 and (embedding or config.get("fan_in_fan_out")):
        left, right = transposed(first), transposed(second)
    expected = ((base.shape[0], rank), (rank, base.shape[-1])) if len(base.shape) == 2 else ()
    if (left.shape, right.shape) != expected:
        raise UserError(
            f"{directory} contains matrices of shape {first.shape} and {second.shape} for {name} "
            f"of shape {base.shape}; correct base_model_name_or_path in its {ADAPTER_CONFIG}."
        )
    scaling = _scaling(directory, config, module, rank)
    size = base.nbytes + first.nbytes + second.nbytes
    of_all = (base, left, right)
    return LowRankInfo(
        name, "F32", base.shape, base.file, 0, size, base.copied_dtype, of_all, scaling
    )


def _scaling(directory: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r), with the values that patterns set for this module."""
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    stated = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
    if not isinstance(alpha, int | float) or stated != rank:
        raise UserError(
            f"{directory / ADAPTER_CONFIG} states lora_alpha {alpha} and rank {stated} for "
            f"{module}, whose matrices have rank {rank}; copy or download it again."
        )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise
