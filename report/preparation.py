"""What preparation left out and changed, as a table with a column for each source."""

from __future__ import annotations

from dataclasses import dataclass

from cpt_merge.tracking import StageLog


@dataclass(frozen=True)
class EffectCell:
    """What a step did to a source. `width` is that of its bar, in percent of the largest share."""

    documents: int
    share: float
    places: int | None
    width: float


@dataclass(frozen=True)
class EffectTable:
    """A row for each step: its name, what it does, and a cell for each source."""

    sources: list[str]
    rows: list[tuple[str, str, list[EffectCell | None]]]


def effect_table(log: StageLog) -> EffectTable | None:
    """The effects that the data stage logged; None if it logged none."""
    columns = list[tuple[str, dict[tuple[str, str], EffectCell]]]()
    records = log.records("data/preparation")
    shares = [float(row["share"] or 0) for row in records]
    largest = max(shares, default=0) or 1
    for row, share in zip(records, shares, strict=True):
        source, key = str(row["source"]), (str(row["step"]), str(row["effect"]))
        # two sources may have the same name
        if not columns or columns[-1][0] != source or key in columns[-1][1]:
            columns.append((source, {}))
        places = row["places"]
        cell = EffectCell(
            int(row["documents"] or 0),
            share,
            int(places) if places is not None else None,
            100 * share / largest,
        )
        columns[-1][1][key] = cell
    if not columns:
        return None
    keys = dict.fromkeys(key for _, cells in columns for key in cells)
    # what is changed comes first, as in the stage
    rows = [
        (*key, [cells.get(key) for _, cells in columns])
        for key in sorted(keys, key=lambda key: key[1])
    ]
    return EffectTable([source for source, _ in columns], rows)
