"""Held-out loss and bits per byte per language, during training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cpt_merge.core.progress import say
from cpt_merge.data.packing import Batch, PackedDocuments, stack
from cpt_merge.data.store import Store, StoreSplit
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.parallel import Parallel


@dataclass(frozen=True)
class HeldoutRows:
    """The first rows of one language's held-out documents."""

    language: str
    sources: list[tuple[PackedDocuments, int]]  # (rows, how many of them)

    @property
    def bytes(self) -> float:
        """UTF-8 bytes of the text in these rows; of a document that is cut, the share of its tokens within."""
        return sum(_bytes_within(packed, packed.length * rows + 1) for packed, rows in self.sources)


def heldout_sequences(
    store: Store, config: TrainingConfig, split: StoreSplit = "heldout"
) -> list[HeldoutRows]:
    """For each language up to `evaluate_sequences` rows, divided over its sources in order."""
    found: dict[str, list[tuple[PackedDocuments, int]]] = {}
    for source in store.info.sources:
        packed = PackedDocuments(store.documents(source, split), config.sequence_length)
        already = sum(rows for _, rows in found.get(source.language, []))
        rows = min(packed.sequences, config.evaluate_sequences - already)
        if packed.sequences == 0 and split == "heldout":
            say(
                f"{source.name}: the held-out text fills no row of {config.sequence_length}; raise corpus.heldout"
            )
        if rows > 0:
            found.setdefault(source.language, []).append((packed, rows))
    return [HeldoutRows(language, sources) for language, sources in found.items()]


def _bytes_within(packed: PackedDocuments, tokens: int) -> float:
    starts, sizes = packed.documents.starts, packed.documents.bytes
    whole = int(np.searchsorted(starts, tokens, side="right")) - 1
    total = float(sizes[:whole].sum())
    if whole < len(sizes):
        total += (
            float(sizes[whole]) * (tokens - starts[whole]) / (starts[whole + 1] - starts[whole])
        )
    return total


@dataclass(frozen=True)
class LanguageLoss:
    """What a model makes of one language's held-out text."""

    loss: float  # nats per token
    bits_per_byte: float  # sum of -log2 p(token) / UTF-8 bytes of the text: comparable across tokenizers (law 10)


def validate(
    loss_of: Callable[[Batch], Tensor],
    heldout: list[HeldoutRows],
    micro_batch: int,
    parallel: Parallel,
    stopped: Callable[[], bool],
) -> dict[str, LanguageLoss] | None:
    """The losses by language, the rows divided over the processes; `loss_of` is a collective that gives the sum of a
    batch's losses in nats. None once `stopped`, also a collective and asked before every batch, says so.
    """
    found = {}
    for rows in heldout:
        places = [(packed, row) for packed, count in rows.sources for row in range(count)]
        nats = _sum_of_losses(loss_of, places, micro_batch, parallel, stopped)
        if nats is None:
            return None
        targets = sum(packed.targets(row) for packed, row in places)
        found[rows.language] = LanguageLoss(nats / targets, nats / math.log(2) / rows.bytes)
    return found


def _sum_of_losses(
    loss_of: Callable[[Batch], Tensor],
    places: list[tuple[PackedDocuments, int]],
    micro_batch: int,
    parallel: Parallel,
    stopped: Callable[[], bool],
) -> float | None:
    mine = places[parallel.world.rank :: parallel.world.size]
    batches = -(
        -len(places) // (parallel.world.size * micro_batch)
    )  # the same on all: FSDP gathers in step
    nats = torch.zeros((), dtype=torch.float64)
    for number in range(batches):
        if stopped():
            return None
        chosen = mine[number * micro_batch : (number + 1) * micro_batch]
        batch = stack([packed.read(row) for packed, row in chosen or places[:1]])
        loss = loss_of(batch.to(parallel.device))
        nats += loss.double().cpu() * bool(chosen)
    return parallel.total(float(nats))
