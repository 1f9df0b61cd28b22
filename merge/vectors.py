"""The sources of a chat vector: a pair of models, or a directory that `extract-vector` wrote."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cpt_merge.checkpoint.dtypes import Array, Float32, widen
from cpt_merge.checkpoint.headers import TensorInfo
from cpt_merge.checkpoint.loaded import open_model
from cpt_merge.checkpoint.model_files import CONFIG_FILE
from cpt_merge.checkpoint.pieces import RearrangedInfo
from cpt_merge.checkpoint.reader import Checkpoint, read_json
from cpt_merge.checkpoint.tokenizer_files import tokenizer_directory
from cpt_merge.core.errors import UserError
from cpt_merge.merge import formula

STEM = "vector"  # of the weight files' names: no loader takes them for a model
VECTOR_FILE = "vector.json"
BASE_FOLDER = "base"  # in a vector's directory: tokenizer and configuration of the base


Rows = NDArray[np.int64]


@dataclass(frozen=True)
class RowPairs:
    """Rows that belong together: `base[i]` and `chat[i]` are one token's."""

    base: Rows
    chat: Rows


@dataclass(frozen=True)
class Difference:
    """d = chat - base of some elements, and base itself where it is known."""

    values: Float32
    base: Float32 | None


class Vector(Protocol):
    """A chat vector, read in parts."""

    @property
    def chat_directory(self) -> Path:
        """Configuration and tokenizer of the chat model."""

    @property
    def base_directory(self) -> Path:
        """Configuration and tokenizer of the base."""

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """The content of config.json of `base` and `chat`."""

    @property
    def models(self) -> Mapping[str, Checkpoint]:
        """The checkpoints that are read, by what they are called in messages."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Of the vector; the matrices of the vocabulary have chat's rows."""

    def elements(self, name: str, start: int, stop: int) -> Difference:
        """Elements [start, stop) in storage order."""

    def rows(self, name: str, rows: RowPairs) -> Difference:
        """Rows of a matrix, shape (rows, width)."""

    def chat_rows(self, name: str, rows: Rows) -> Float32:
        """Rows of the chat model itself, for the tokens of its format."""

    def chat_elements(self, name: str, start: int, stop: int) -> Float32:
        """Elements of the chat model itself."""

    def changed(self, change: Callable[[Checkpoint], Checkpoint]) -> Vector:
        """The same with other checkpoints in place of its own."""


@dataclass(frozen=True)
class Pair:
    """`chat - base` of two checkpoints."""

    base: Checkpoint
    chat: Checkpoint

    @property
    def chat_directory(self) -> Path:
        """The chat model's."""
        return tokenizer_directory(self.chat)

    @property
    def base_directory(self) -> Path:
        """The base's."""
        return tokenizer_directory(self.base)

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Of both."""
        return {"base": self.base.config, "chat": self.chat.config}

    @property
    def models(self) -> Mapping[str, Checkpoint]:
        """Both."""
        return {"base": self.base, "chat": self.chat}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The chat model's."""
        return self.chat.tensors

    def elements(self, name: str, start: int, stop: int) -> Difference:
        """Elements [start, stop) in storage order."""
        base = _float32(self.base, name, start, stop)
        return Difference(formula.vector(_float32(self.chat, name, start, stop), base), base)

    def rows(self, name: str, rows: RowPairs) -> Difference:
        """Rows of a matrix, shape (rows, width)."""
        base = self.base.gather_float32(name, rows.base)
        return Difference(formula.vector(self.chat.gather_float32(name, rows.chat), base), base)

    def chat_rows(self, name: str, rows: Rows) -> Float32:
        """Rows of the chat model."""
        return self.chat.gather_float32(name, rows)

    def chat_elements(self, name: str, start: int, stop: int) -> Float32:
        """Elements of the chat model."""
        return _float32(self.chat, name, start, stop)

    def changed(self, change: Callable[[Checkpoint], Checkpoint]) -> Pair:
        """The same pair with both models changed."""
        return Pair(change(self.base), change(self.chat))


@dataclass(frozen=True)
class Extracted:
    """A vector that was written before. Only what compares with the base needs `base`."""

    stored: Checkpoint
    base: Checkpoint | None
    description: dict[str, Any]  # vector.json

    @staticmethod
    def open(directory: Path, base: Path | None) -> Extracted:
        """Raises `UserError` if the directory has no vector."""
        if not (directory / VECTOR_FILE).is_file():
            raise UserError(
                f"{directory} holds no {VECTOR_FILE}; make a vector with `cpt-merge "
                "extract-vector`."
            )
        description = read_json(directory / VECTOR_FILE)
        if not {"base_types", "base_squares"} <= description.keys():
            raise UserError(f"{directory / VECTOR_FILE} is incomplete; make the vector again.")
        return Extracted(
            Checkpoint.open(directory, STEM), open_model(base) if base else None, description
        )

    @property
    def chat_directory(self) -> Path:
        """The vector's directory holds the chat model's files."""
        return self.stored.directory

    @property
    def base_directory(self) -> Path:
        """A folder in it holds the base's."""
        return self.stored.directory / BASE_FOLDER

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Of both, as the vector's directory keeps them."""
        return {"base": read_json(self.base_directory / CONFIG_FILE), "chat": self.stored.config}

    @property
    def models(self) -> Mapping[str, Checkpoint]:
        """The vector, and the base where it was given."""
        return {"vector": self.stored, **({"base": self.base} if self.base else {})}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The stored ones."""
        return self.stored.tensors

    def elements(self, name: str, start: int, stop: int) -> Difference:
        """Elements [start, stop) in storage order."""
        base = _float32(self.base, name, start, stop) if self.base else None
        return Difference(_float32(self.stored, name, start, stop), base)

    def rows(self, name: str, rows: RowPairs) -> Difference:
        """Rows of a matrix, shape (rows, width)."""
        base = self.base.gather_float32(name, rows.base) if self.base else None
        return Difference(self.stored.gather_float32(name, rows.chat), base)

    def chat_rows(self, name: str, rows: Rows) -> Float32:
        """Rows of the format's tokens, which the vector stores as in the chat model."""
        return self.stored.gather_float32(name, rows)

    def chat_elements(self, name: str, start: int, stop: int) -> Float32:
        """Never called: the plan refuses rules that need the chat model itself."""
        raise NotImplementedError(name)

    def changed(self, change: Callable[[Checkpoint], Checkpoint]) -> Extracted:
        """The same with the vector and the base changed; the description has their names.

        The norm of a tensor that others were made of is divided over them by their sizes.
        """
        base, stored = change(self.base) if self.base else None, change(self.stored)
        named = {info.name: name for name, info in stored.tensors.items()}
        of_names = {
            field: {named.get(name, name): value for name, value in self.description[field].items()}
            for field in ("base_types", "base_squares")
        }
        for name, info in stored.tensors.items():
            if isinstance(info, RearrangedInfo):
                types, squares = of_names["base_types"], of_names["base_squares"]
                shares = info.shares()
                known = [types[one] for one in shares if one in types]
                if known:
                    types[name] = known[0]
                squares[name] = sum(part * squares.get(one, 0.0) for one, part in shares.items())
        return replace(self, stored=stored, base=base, description=self.description | of_names)

    def base_type(self, name: str) -> str | None:
        """The type that the base stores a tensor in; None if the base has no such tensor."""
        found = self.description["base_types"].get(name)
        return None if found is None else str(found)


@dataclass(frozen=True)
class Towards:
    """The chat model itself, as where CPT is led to; `values` are its own elements.

    There is no base. Rows are aligned by the tokens that CPT and the chat model share.
    """

    chat: Checkpoint
    tokenizer: Path  # CPT's

    @property
    def chat_directory(self) -> Path:
        """The chat model's."""
        return self.chat.directory

    @property
    def base_directory(self) -> Path:
        """Where CPT's tokenizer is, because CPT is what the chat model is compared with."""
        return self.tokenizer

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Of the chat model."""
        return {"chat": self.chat.config}

    @property
    def models(self) -> Mapping[str, Checkpoint]:
        """The chat model."""
        return {"chat": self.chat}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The chat model's."""
        return self.chat.tensors

    def elements(self, name: str, start: int, stop: int) -> Difference:
        """Elements of the chat model."""
        return Difference(_float32(self.chat, name, start, stop), None)

    def rows(self, name: str, rows: RowPairs) -> Difference:
        """Rows of the chat model."""
        return Difference(self.chat.gather_float32(name, rows.chat), None)

    def chat_rows(self, name: str, rows: Rows) -> Float32:
        """Rows of the chat model."""
        return self.chat.gather_float32(name, rows)

    def chat_elements(self, name: str, start: int, stop: int) -> Float32:
        """Elements of the chat model."""
        return _float32(self.chat, name, start, stop)

    def changed(self, change: Callable[[Checkpoint], Checkpoint]) -> Towards:
        """The same with the chat model changed."""
        return replace(self, chat=change(self.chat))


def sample_digest(base: Checkpoint) -> str:
    """sha256 of the first elements of every tensor: identifies a base without reading all of it."""
    found, stored = hashlib.sha256(), open_model(base.directory)  # by the names of its files
    for name, info in sorted(stored.tensors.items()):
        found.update(name.encode() + stored.read_flat(name, 0, min(info.size, 64)).tobytes())
    return found.hexdigest()


def check_base(vector: Vector) -> None:
    """Raise `UserError` if an extracted vector comes with another base than it was made from."""
    if not isinstance(vector, Extracted) or vector.base is None:
        return
    if vector.description.get("base_sample") != sample_digest(vector.base):
        raise UserError(
            f"{vector.base.directory} is not the base that {vector.stored.directory} was made with "
            f"({vector.description.get('models', {}).get('base', {}).get('name')}); give that one, "
            "or none."
        )


def mean_rows(vector: Vector, name: str, groups: list[RowPairs]) -> Float32:
    """The mean vector of each group of rows, shape (groups, width), added in their order."""
    means = np.empty((len(groups), vector.tensors[name].row_size), np.float32)
    for number, group in enumerate(groups):
        values = vector.rows(name, group).values
        total = values[0]
        for row in values[1:]:
            total += row
        means[number] = total / np.float32(len(values))
    return means


def _float32(checkpoint: Checkpoint, name: str, start: int, stop: int) -> Float32:
    stored: Array = checkpoint.read_flat(name, start, stop)
    return widen(stored, checkpoint.tensors[name].dtype)
