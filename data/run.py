"""The data stage: text and tokenizer to token store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from cpt_merge.core.progress import say
from cpt_merge.core.world import find_world
from cpt_merge.data.config import DataConfig
from cpt_merge.data.sources import Corpus, source_files
from cpt_merge.data.store import StoreInfo
from cpt_merge.data.tokenise import write_store
from cpt_merge.tracking import Cell, Tracker

BLOCK = 1 << 20  # documents looked at at a time
PROCESS_BYTES = 4_000_000  # of text for each process, where their number is not set: starting one takes a second or two


def run(
    config: DataConfig,
    corpus: Corpus,
    tokenizer: Path,
    out: Path,
    tracker: Tracker,
    base: Path | None = None,
) -> dict[str, Any]:
    """Tokenise every source into the store `out`. Returns the totals.

    With `base`, the original base model's directory, the held-out text is also stored in that model's tokens.
    """
    processes = config.processes or _processes(corpus)
    say(f"  tokenising in {processes} process(es)")
    info = write_store(
        corpus,
        tokenizer,
        out,
        base=base,
        processes=processes,
        deduplicate=config.deduplicate,
        world=find_world(),
    )
    columns = [
        "source",
        "documents",
        "tokens",
        "MB",
        "bytes per token",
        "held-out documents",
        "empty",
        "duplicates",
    ]
    rows = _rows(info)
    tracker.table("data/sources", columns, rows)
    for name, documents, tokens, size, ratio, heldout, empty, duplicates in rows:
        say(
            f"  {name}: {documents:,} documents ({heldout} held out), {tokens:,} tokens, {size} MB, "
            f"{ratio} bytes/token; left out: {empty:,} empty, {duplicates:,} duplicates"
        )
    totals = {
        "documents": sum(source.train.documents for source in info.sources),
        "tokens": sum(source.train.tokens for source in info.sources),
        "bytes": sum(source.train.bytes for source in info.sources),
        "heldout_documents": sum(source.heldout.documents for source in info.sources),
        "empty_documents": sum(source.empty for source in info.sources),
        "duplicates": sum(source.duplicates for source in info.sources),
    }
    tracker.summary({f"data/{name}": value for name, value in totals.items()})
    if find_world().is_main:
        columns = ["source", "log2 of tokens", "share of documents"]
        tracker.curves("data/document lengths", columns, _lengths(info, out))
    return totals


def _processes(corpus: Corpus) -> int:
    """As many as this process may use cores, but not for a little text."""
    cores = int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or len(os.sched_getaffinity(0))
    files = [source_files(source) for source in corpus.sources]
    if not all(files):  # a hub dataset, of unknown size
        return cores
    size = sum(file.stat().st_size for of_source in files for file in of_source)
    return max(1, min(cores, size // PROCESS_BYTES))


def _rows(info: StoreInfo) -> list[list[Cell]]:
    return [
        [
            source.name, source.train.documents, source.train.tokens, round(source.train.bytes / 1e6, 2),
            round(source.train.bytes / source.train.tokens, 2), source.heldout.documents, source.empty,
            source.duplicates,
        ]
        for source in info.sources
    ]  # fmt: skip


def _lengths(info: StoreInfo, store: Path) -> list[list[Cell]]:
    """For each source the share of its documents that have 2^n to 2^(n+1) - 1 tokens."""
    rows: list[list[Cell]] = []
    for source in info.sources:
        starts = np.load(store / source.folder / "train" / "starts.npy", mmap_mode="r")
        counts = np.zeros(64, np.int64)
        for first in range(0, len(starts) - 1, BLOCK):
            lengths = np.diff(starts[first : first + BLOCK + 1])
            counts += np.bincount(np.frexp(lengths)[1] - 1, minlength=64)
        used = np.flatnonzero(counts)
        if len(used):
            shares = counts / counts.sum()
            rows += [
                [source.name, n, round(float(shares[n]), 4)]
                for n in range(int(used[0]), int(used[-1]) + 1)
            ]
    return rows
