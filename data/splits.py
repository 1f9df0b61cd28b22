"""Splits of datasets and slices of them, in the notation of `datasets`: `train[:10%]+test`."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PART = re.compile(r"(?P<name>[\w.-]+)(\[(?P<start>\d*%?):(?P<stop>\d*%?)\])?")


@dataclass(frozen=True)
class SplitPart:
    """A split, or the rows of it between two bounds: numbers or percentages, "" for none."""

    name: str
    start: str = ""
    stop: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole split."""
        return not (self.start or self.stop)

    @property
    def needs_total(self) -> bool:
        """Whether its bounds depend on the number of rows."""
        return "%" in self.start + self.stop

    def rows(self, total: int = 0) -> tuple[int, int | None]:
        """The first row and the one after the last, of `total` rows; None: up to the end."""
        start = _bound(self.start, total) if self.start else 0
        return start, _bound(self.stop, total) if self.stop else None


def parse_split(split: str) -> list[SplitPart]:
    """The parts that `+` joins. Raises `ValueError` for another notation."""
    parts = []
    for text in split.split("+"):
        found = _PART.fullmatch(text.strip())
        if not found:
            raise ValueError("is not like train, train[:10%], train[1000:2000] or train+test")
        parts.append(SplitPart(found["name"], found["start"] or "", found["stop"] or ""))
    return parts


def _bound(text: str, total: int) -> int:
    """The row of a bound; percentages are rounded to the next row, as `datasets` does."""
    if text.endswith("%"):
        return min(total, round(int(text[:-1]) * total / 100))
    return int(text)
