"""Compatibility: how a checkpoint stores the tensors of a transformers model.

Uses `conversion_mapping` and `core_model_loading` of transformers, which are not a documented API.
Tested with transformers 5.23.0.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from cpt_merge.checkpoint.pieces import Piece, RearrangedInfo, inverted
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.traced import NotMovedError, TracedTensor
from cpt_merge.core.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
_NUMBERED = re.compile(r"(.*\.)(\d+)(\..*)")


@dataclass(frozen=True)
class Rearranged:
    """A tensor of a model that a checkpoint stores in another arrangement."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]  # their sources are the stored tensors


@dataclass(frozen=True)
class Group:
    """Tensors of a model, and the stored ones that have their elements: neither have others."""

    tensors: tuple[str, ...]
    stored: dict[str, tuple[Piece, ...]]  # stored name -> its pieces, whose sources are `tensors`


@dataclass(frozen=True)
class StoredTensors:
    """Where a checkpoint holds the tensors of a model."""

    names: dict[str, str]
    """The model's name -> the checkpoint's name, for tensors that are stored as they are."""
    rearranged: dict[str, Rearranged]
    """By the model's names, for those that transformers joins, splits or reorders."""
    shapes: Shapes
    """Of the stored tensors."""

    @cached_property
    def groups(self) -> dict[str, Group]:
        """The group of each rearranged tensor of the model."""
        of_stored = inverted({name: tensor.pieces for name, tensor in self.rearranged.items()})
        found: dict[str, Group] = {}
        for name in self.rearranged:
            if name not in found:
                group = self._group_around(name, of_stored)
                found |= dict.fromkeys(group.tensors, group)
        return found

    def _group_around(self, name: str, of_stored: Mapping[str, tuple[Piece, ...]]) -> Group:
        tensors, stored, new = [name], dict[str, tuple[Piece, ...]](), [name]
        while new:
            sources = {p.source: None for each in new for p in self.rearranged[each].pieces}
            stored |= {source: of_stored[source] for source in sources}
            both = {p.source: None for source in sources for p in of_stored[source]}
            new = [each for each in both if each not in tensors]
            tensors += new
        return Group(tuple(tensors), stored)

    @property
    def used(self) -> set[str]:
        """The stored tensors that are in the model."""
        return self.stored_names((*self.names, *self.rearranged))

    def stored_names(self, names: Iterable[str]) -> set[str]:
        """The stored tensors that hold these tensors of the model."""
        names = set(names)
        whole = {self.names.get(name, name) for name in names - self.rearranged.keys()}
        return whole.union(*(self.groups[name].stored for name in names & self.rearranged.keys()))

    def check_shape(self, name: str, shape: Sequence[int], directory: Path) -> None:
        """Raise `UserError` if a tensor of the model is stored in parts of which one is missing, or
        in another shape; what is not stored at all is not looked at.
        """
        made = self.rearranged.get(name)
        sources = {piece.source for piece in made.pieces} if made else set()
        lacking = _first_lacking(sources, shape[0] if made and made.shape[1:] == shape[1:] else 0)
        if lacking:
            raise UserError(
                f"{directory} lacks {lacking}, a part of {name}; copy or download the model again, "
                "or correct its config.json."
            )
        found = made.shape if made else self.shapes.get(self.names.get(name, ""), shape)
        if tuple(found) != tuple(shape):
            parts = f" as {len(sources)} tensors, together" if sources else ""
            raise UserError(
                f"{directory} holds {self.names.get(name, name)}{parts} in shape {tuple(found)}, "
                f"but the model needs {tuple(shape)}; use a checkpoint of the architecture that "
                "its config.json names."
            )

    def likely_name(self, model: Any, name: str) -> str:
        """The name by which the files would hold a tensor of the model that they lack.

        It is the one by which transformers saves it, or differs from the model's name in the same
        part as the names of others.
        """
        state, (renamings, converters) = model.state_dict(), _mapping(model)
        prefix = model.base_model_prefix
        parts = name.split(".")
        others = [(other.split("."), stored.split(".")) for other, stored in self.names.items()]
        others.sort(key=lambda pair: -_common(parts, pair[0]))
        candidates = [_saved_name(model, name)] if _saves(model, others[:1]) else []
        for other, stored in others:
            tail = _common(other[::-1], stored[::-1])
            head = other[: len(other) - tail]
            if parts[: len(head)] == head:
                candidates.append(".".join(stored[: len(stored) - tail] + parts[len(head) :]))
        for candidate in candidates:
            if rename_source_key(candidate, renamings, converters, prefix, state)[0] == name:
                return candidate
        return name

    def seen_in(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint, in which rearranged tensors have the model's names and shapes as well."""
        added = {
            name: RearrangedInfo.of(name, tensor.shape, tensor.pieces, checkpoint.tensors)
            for name, tensor in self.rearranged.items()
        }
        return replace(checkpoint, tensors={**checkpoint.tensors, **added})


def find_stored(model: Any, stored: Shapes, directory: Path) -> StoredTensors:
    """Which stored tensors are which of the model's; `stored` are those of `directory`.

    Names differ if transformers renames tensors when it loads them (GPT-NeoX: `embed_out` is
    `lm_head`), or if the decoder was saved alone (GPT-2: `wte` is `transformer.wte`). Tensors that
    transformers rearranges (the experts of most families are stored one by one) are followed
    through its own operations. Raises `UserError` if these compute new values.
    """
    state, (renamings, converters) = model.state_dict(), _mapping(model)
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    names: dict[str, str] = {}
    conversions: dict[str, WeightConverter] = {}  # by the first tensor that each one makes
    for name in sorted(stored, key=dot_natural_key):
        found, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if found not in state and name in state:
            found, pattern = name, None
        if found not in state:
            continue
        if pattern is None:
            names[found] = name
            continue
        if found not in conversions:
            conversions[found] = deepcopy(by_pattern[pattern])
        traced = TracedTensor.stored(name, stored[name])
        conversions[found].add_tensor(found, name, pattern, traced)
    rearranged: dict[str, Rearranged] = {}
    for first, converter in conversions.items():
        for found, tensor in _converted(first, converter, model, directory).items():
            source = tensor.pieces[0].source
            if tensor.pieces == TracedTensor.stored(source, tensor.shape).pieces:
                names[found] = source  # the converter left it as it was
            else:
                rearranged[found] = tensor
    return StoredTensors(names, rearranged, stored)


def _mapping(model: Any) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """What transformers renames, and what it converts, when it loads a model."""
    mapping = get_model_conversion_mapping(model)
    return (
        [entry for entry in mapping if isinstance(entry, WeightRenaming)],
        [entry for entry in mapping if isinstance(entry, WeightConverter)],
    )


def _saved_name(model: Any, name: str) -> str:
    """The name by which transformers saves a tensor of a model."""
    reverse = [entry.reverse_transform() for entry in get_model_conversion_mapping(model)[::-1]]
    renamings = [entry for entry in reverse if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
    saved: str = rename_source_key(name, renamings, converters, reverse=True)[0]
    return saved


def _saves(model: Any, names: Iterable[tuple[list[str], list[str]]]) -> bool:
    """Whether transformers saves tensors by their stored names; both are given in parts."""
    return all(_saved_name(model, ".".join(name)).split(".") == stored for name, stored in names)


def _first_lacking(names: Iterable[str], count: int = 0) -> str | None:
    """The first name that is missing in series of names that differ in one number.

    The numbers are counted from 0, up to the largest one of all series or to `count`.
    """
    series: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if found := _NUMBERED.match(name):
            series.setdefault((found[1], found[3]), set()).add(int(found[2]))
    numbers = set[int]().union(*series.values())
    if len(numbers) < 2:  # of the layer
        return None
    wanted = range(max(*(number + 1 for number in numbers), count))
    lacking = (
        f"{head}{number}{tail}"
        for (head, tail), seen in sorted(series.items())
        for number in wanted
        if number not in seen
    )
    return next(lacking, None)


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """How many items two sequences have in common at their beginning."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _converted(
    first: str, converter: WeightConverter, model: Any, directory: Path
) -> dict[str, Rearranged]:
    """What a converter of transformers makes of the traced tensors that it has collected."""
    missing = [
        name for name in converter.source_patterns if name not in converter.collected_tensors
    ]
    sources = [
        one.pieces[0].source for each in converter.collected_tensors.values() for one in each
    ]
    try:
        made = converter.convert(first, model=model, config=model.config)
    except Exception as error:  # of transformers' operations, on tensors that do not fit together
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if isinstance(error, NotMovedError):
            reason = f"it computes new values ({error})"
        if missing:
            raise UserError(
                f"{directory} holds a part of what makes {first} of {type(model).__name__}, but no "
                f"{missing[0]}; copy or download it again."
            ) from None
        lacking = _first_lacking(sources)
        if lacking:
            raise UserError(
                f"{directory} lacks {lacking}, a part of {first}; copy or download the model again."
            ) from None
        operations = ", ".join(type(entry).__name__ for entry in converter.operations)
        raise UserError(
            f"{directory} stores {first} of {type(model).__name__} in a form that transformers "
            f"converts with {operations}, which cannot be followed here: {reason}."
        ) from None
    whole = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
    return {name: Rearranged(tuple(value.shape), value.pieces) for name, value in whole.items()}
