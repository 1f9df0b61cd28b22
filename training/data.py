"""The data stage: text and tokenizer to token store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.artifact import new_directory
from core.progress import say
from core.sources import Corpus
from tracking import Tracker
from tracking.tracker import Cell
from training.config import DataConfig
from training.store import StoreInfo, write_store


def run(config: DataConfig, corpus: Corpus, tokenizer: Path, out: Path, tracker: Tracker) -> dict[str, Any]:
    """Tokenise every source into the store `out`. Returns the totals."""
    with new_directory(out) as beside:
        info = write_store(corpus, tokenizer, beside, config.batch_documents)
    columns = ["source", "documents", "tokens", "MB", "bytes per token", "share of training", "held-out documents"]
    rows = _rows(info)
    tracker.table("data/sources", columns, rows)
    for name, documents, tokens, size, ratio, _, heldout in rows:
        say(
            f"  {name}: {documents:,} documents ({heldout} held out), {tokens:,} tokens, {size} MB, {ratio} bytes/token"
        )
    totals = {
        "documents": sum(source.train.documents for source in info.sources),
        "tokens": sum(source.train.tokens for source in info.sources),
        "bytes": sum(source.train.bytes for source in info.sources),
        "heldout_documents": sum(source.heldout.documents for source in info.sources),
    }
    tracker.summary({f"data/{name}": value for name, value in totals.items()})
    return totals


def _rows(info: StoreInfo) -> list[list[Cell]]:
    weight = sum(source.weight for source in info.sources)
    return [
        [
            source.name, source.train.documents, source.train.tokens, round(source.train.bytes / 1e6, 2),
            round(source.train.bytes / source.train.tokens, 2), round(source.weight / weight, 3),
            source.heldout.documents,
        ]
        for source in info.sources
    ]  # fmt: skip
