"""What readers give: rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read. `reason` continues a sentence: "line 3" "is not UTF-8"."""

    reason: str


Record = dict[str, Any]
Row = tuple[int, Record | str | BadRow]  # (its number from 1, fields or the text itself)
