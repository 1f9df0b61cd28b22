"""What a stage logs: one data class for each kind of event."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEP = "train/step"  # the optimizer step: the x axis of every row that has one
TOKENS = "train/tokens"  # the second x axis, in every row of training metrics

Cell = str | int | float | bool | None
Row = dict[str, float]


@dataclass(frozen=True)
class Scalars:
    """One row of metrics by name (`train/loss`), `STEP` among them if the row has a step."""

    values: Row


@dataclass(frozen=True)
class Table:
    """A table of scalars, displayed as a whole."""

    name: str
    columns: list[str]
    rows: list[list[Cell]]

    @property
    def records(self) -> list[dict[str, Cell]]:
        """The rows as dictionaries by column."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


@dataclass(frozen=True)
class Curves(Table):
    """A table whose three columns are a curve's name, x and y, displayed as a chart."""


@dataclass(frozen=True)
class Image:
    """A PNG file."""

    name: str
    path: Path


@dataclass(frozen=True)
class File:
    """A small file that is kept with the run under `name`."""

    name: str
    path: Path


@dataclass(frozen=True)
class Summary:
    """Final values of the stage."""

    values: Mapping[str, Any]


@dataclass(frozen=True)
class Alert:
    """Something that a person should look at now."""

    title: str
    text: str


@dataclass(frozen=True)
class Artifact:
    """A directory or file that the stage used or made.

    Its digest tells versions of the same name apart.
    """

    name: str
    kind: str  # text, tokenizer, model or store
    uri: str  # file://... or https://...
    digest: str
    used: bool


Event = Scalars | Table | Image | File | Summary | Alert | Artifact
