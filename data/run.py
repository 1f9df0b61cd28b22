"""The data stage: from text and a tokenizer to the token store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from cpt_merge.core.progress import counted, say
from cpt_merge.core.world import find_world
from cpt_merge.data.config import DataConfig
from cpt_merge.data.hub_datasets import size_of
from cpt_merge.data.preparation.notes import Notes, read_notes
from cpt_merge.data.preparation.summary import Effect, effects_of, show_preparation
from cpt_merge.data.sources import Corpus, source_files
from cpt_merge.data.store import StoreInfo, describe_left_out
from cpt_merge.data.tokenise import write_store
from cpt_merge.data.workers import processes_for
from cpt_merge.tracking import Cell, Tracker

_BLOCK = 1 << 20  # documents whose lengths are counted at a time
_PROCESS_BYTES = 4_000_000  # least text per process, since starting one takes a second or two


def run(
    config: DataConfig,
    corpus: Corpus,
    tokenizer: Path,
    out: Path,
    tracker: Tracker,
    base: Path | None = None,
    blocks_at: Path | None = None,
) -> dict[str, Any]:
    """Tokenise every source into the store `out` and return the totals.

    With `base`, the directory of the original base model, the held-out text is also stored in the
    tokens of that model. `blocks_at` is where tokenised blocks are kept for the next store.
    """
    processes, world = config.processes or _processes(corpus), find_world()
    say(f"  tokenising in {counted(processes, 'process')}")
    info = write_store(
        corpus, tokenizer, out, base=base, processes=processes, deduplicate=config.deduplicate,
        near_duplicates=config.near_duplicates, keep_blocks=config.keep_blocks,
        blocks_at=blocks_at, world=world,
    )  # fmt: skip
    rows = list[list[Cell]]()
    for source in info.sources:
        train, heldout = source.train, source.heldout.documents
        megabytes, ratio = round(train.bytes / 1e6, 2), round(train.bytes / train.tokens, 2)
        left_out = sum(source.left_out.values())
        rows.append(
            [source.name, train.documents, train.tokens, megabytes, ratio, heldout, left_out]
        )
        say(
            f"  {source.name}: {train.documents:,} documents ({heldout} held out), "
            f"{train.tokens:,} tokens, {megabytes} MB, {ratio} bytes/token; "
            f"left out: {describe_left_out(source.left_out)}"
        )
    columns = ["source", "documents", "tokens", "MB", "bytes per token", "held-out documents"]
    tracker.table("data/sources", [*columns, "left out"], rows)
    notes = read_notes(out)
    effects = [
        effect
        for source, of_source in zip(info.sources, notes or repeat(Notes()), strict=False)
        for effect in effects_of(source, of_source)
    ]
    tracker.table("data/preparation", Effect.columns(), [one.row() for one in effects])
    if notes:
        show_preparation(effects, info, notes, tracker)
    totals = {
        "documents": sum(source.train.documents for source in info.sources),
        "tokens": sum(source.train.tokens for source in info.sources),
        "bytes": sum(source.train.bytes for source in info.sources),
        "heldout_documents": sum(source.heldout.documents for source in info.sources),
        **_sums("left_out", [source.left_out for source in info.sources]),
        **_sums("changed", [of_source.changed for of_source in notes]),
    }
    tracker.summary({f"data/{name}": value for name, value in totals.items()})
    if world.is_main:
        columns = ["source", "log2 of tokens", "share of documents"]
        tracker.curves("data/document lengths", columns, _lengths(info, out))
    return totals


def _sums(name: str, of_sources: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The counts of all sources together, by step."""
    sums = Counter[str]()
    for counts in of_sources:
        sums.update(counts)
    return {f"{name}.{step}": count for step, count in sums.items()}


def _processes(corpus: Corpus) -> int:
    size = sum(size_of(file) for source in corpus.sources for file in source_files(source))
    return processes_for(size, _PROCESS_BYTES)


def _lengths(info: StoreInfo, store: Path) -> list[list[Cell]]:
    """For each source, the share of its documents that have 2^n to 2^(n+1) - 1 tokens."""
    rows: list[list[Cell]] = []
    for source in info.sources:
        starts = np.load(store / source.folder / "train" / "starts.npy", mmap_mode="r")
        counts = np.zeros(64, np.int64)
        for first in range(0, len(starts) - 1, _BLOCK):
            lengths = np.diff(starts[first : first + _BLOCK + 1])
            counts += np.bincount(np.frexp(lengths)[1] - 1, minlength=64)
        used = np.flatnonzero(counts)
        if len(used):
            shares = counts / counts.sum()
            rows += [
                [source.name, n, round(float(shares[n]), 4)]
                for n in range(int(used[0]), int(used[-1]) + 1)
            ]
    return rows
