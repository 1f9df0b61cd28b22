"""From parts to a store: the selected documents in order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from cpt_merge.core.errors import UserError
from cpt_merge.data.parts import Parts
from cpt_merge.data.preparation.notes import Notes
from cpt_merge.data.preparation.steps import BAD_ROWS
from cpt_merge.data.selection import Keep, Pieces, Selection
from cpt_merge.data.sources import Corpus
from cpt_merge.data.store import (
    SPLITS,
    SourceInfo,
    SplitCounts,
    SplitWriter,
    StoreSplit,
    TokenizerInfo,
    describe_left_out,
    source_folder,
)


def join(
    parts: Parts,
    pieces: Pieces,
    corpus: Corpus,
    tokenizers: dict[StoreSplit, TokenizerInfo],
    out: Path,
    selection: Selection,
) -> tuple[list[SourceInfo], list[Notes]]:
    """Write all sources under `out`; returns them, and what preparation did to their documents.

    Raises `UserError` for a source without training text.
    """
    found, of_sources = [], []
    for number, source in enumerate(corpus.sources):
        folder = source_folder(number, source.name)
        counts: dict[StoreSplit, SplitCounts] = {}
        notes = Notes(left_out=Counter({BAD_ROWS: 0}))
        notes.add(corpus.preparation(source).no_notes())
        for part, row in parts.blocks(pieces[number]):
            notes.add(part.notes(row))
        notes.left_out.update(selection.left_out[number])
        for split, tokenizer in tokenizers.items():
            keep = selection.of(split, number)
            counts[split] = _write(
                parts, pieces[number], split, tokenizer, out / folder / split, keep
            )
        if not counts["train"].documents:
            raise UserError(
                f"text source {source.path} yields no training text (left out: "
                f"{describe_left_out(notes.left_out)}); give it text or remove it."
            )
        splits = {split: counts.get(split) for split in SPLITS}
        left_out = dict(notes.left_out)
        found.append(SourceInfo(source.name, source.language, folder, left_out, **splits))  # type: ignore[arg-type]
        of_sources.append(notes)
    return found, of_sources


def _write(
    parts: Parts,
    pieces: list[str],
    split: StoreSplit,
    tokenizer: TokenizerInfo,
    folder: Path,
    keep: Keep | None,
) -> SplitCounts:
    writer, first = SplitWriter(folder, tokenizer.dtype), 0
    for encoded in parts.read(pieces, split):
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
