"""From parts to a store: the blocks in order, without duplicates."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cpt_merge.core.errors import UserError
from cpt_merge.data.parts import REASONS, Encoded, Parts
from cpt_merge.data.sources import Source
from cpt_merge.data.store import (
    SPLITS,
    SourceInfo,
    SplitCounts,
    SplitWriter,
    StoreSplit,
    TokenizerInfo,
    describe_left_out,
)

Keep = npt.NDArray[np.bool_]
Pieces = list[list[str]]  # the keys of the pieces of each source


def join(
    parts: Parts,
    pieces: Pieces,
    sources: list[Source],
    tokenizers: dict[StoreSplit, TokenizerInfo],
    out: Path,
    deduplicate: bool,
) -> list[SourceInfo]:
    """Write all sources under `out`. Raises `UserError` for one without training text."""
    keep = {split: _first_ones(parts, pieces, split) for split in tokenizers} if deduplicate else {}
    found = []
    for number, source in enumerate(sources):
        folder = f"{number:02d}-" + re.sub(r"[^\w.-]+", "-", source.name)
        counts: dict[StoreSplit, SplitCounts] = {}
        left_out = Counter[str](dict.fromkeys((*REASONS, "duplicates"), 0))
        for piece in pieces[number]:
            for part, row in parts.of_piece(piece):
                left_out.update(part.left_out(row))
        for split, tokenizer in tokenizers.items():
            kept = keep[split][number] if deduplicate else None
            counts[split] = _write(
                parts, pieces[number], split, tokenizer, out / folder / split, kept
            )
            if kept is not None and split != "reference":
                left_out["duplicates"] += int((~kept).sum())
        if not counts["train"].documents:
            raise UserError(
                f"text source {source.path} yields no training text (left out: "
                f"{describe_left_out(left_out)}); give it text or remove it."
            )
        splits = {split: counts.get(split) for split in SPLITS}
        found.append(SourceInfo(source.name, source.language, folder, dict(left_out), **splits))  # type: ignore[arg-type]
    return found


def _write(
    parts: Parts,
    pieces: list[str],
    split: StoreSplit,
    tokenizer: TokenizerInfo,
    folder: Path,
    keep: Keep | None,
) -> SplitCounts:
    writer, first = SplitWriter(folder, tokenizer.dtype), 0
    for encoded in _blocks(parts, pieces, split):
        last = first + len(encoded.lengths)
        kept = keep[first:last] if keep is not None else None
        if kept is None or kept.all():
            writer.add(encoded.tokens, encoded.lengths, encoded.bytes)
        else:
            tokens = encoded.tokens[np.repeat(kept, encoded.lengths)]
            writer.add(tokens, encoded.lengths[kept], encoded.bytes[kept])
        first = last
    counts = writer.close()
    if counts.largest >= tokenizer.rows:
        raise UserError(
            f"{folder} contains token {counts.largest}, but its tokenizer has {tokenizer.rows} "
            "rows; fix the tokenizer."
        )
    return counts


def _blocks(parts: Parts, pieces: list[str], split: StoreSplit) -> Iterator[Encoded]:
    for piece in pieces:
        for part, row in parts.of_piece(piece):
            encoded = part.read(row, split)
            if encoded is not None:
                yield encoded


def _first_ones(parts: Parts, pieces: Pieces, split: StoreSplit) -> list[Keep]:
    """For each source, which documents are the first with their text in all sources."""
    none = np.zeros((0, 2), np.uint64)
    hashes = [
        np.concatenate([none, *(encoded.hashes for encoded in _blocks(parts, of_source, split))])
        for of_source in pieces
    ]
    keep = first_occurrences(np.concatenate(hashes))
    return np.split(keep, np.cumsum([len(of_source) for of_source in hashes])[:-1])


def first_occurrences(hashes: npt.NDArray[np.uint64]) -> Keep:
    """Which rows of `hashes` [documents, 2] occur for the first time.

    Takes about 50 bytes of memory per row.
    """
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal rows keep their order
    ordered = hashes[order]
    keep = np.ones(len(hashes), np.bool_)
    keep[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return keep
