"""Packed sequences: windows of the token files, in which documents do not see each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cpt_merge.core.errors import UserError
from cpt_merge.data.order import SequenceOrder
from cpt_merge.data.store import MAKE_AGAIN, Documents, Store

IGNORED = -100  # a label that is no target

Integers = npt.NDArray[np.int64]
Sequences = tuple[Integers, Integers, Integers]  # input ids, labels, position ids


@dataclass(frozen=True)
class Batch:
    """Sequences for the model; the first three tensors are of shape [sequences, length], int64.

    `labels[i, t]` is the token after `input_ids[i, t]` in the same document, or IGNORED at a document's last token;
    `position_ids` begin at 0 with every document, which is how transformers knows where documents part.
    `cu_seqlens` (int32) are the places in the flattened batch at which a document or a sequence begins, and its end:
    0 first, sequences * length last. `max_length` is the largest distance between two of them. Both are what
    attention kernels take for packed sequences, made here so that no kernel has to wait for the device.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_length: int

    @staticmethod
    def of(input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor) -> Batch:
        """A batch on the CPU, with the boundaries that follow from the positions."""
        flat = position_ids.numpy().ravel()
        boundaries = np.append(np.flatnonzero(flat == 0), flat.size).astype(np.int32)
        return Batch(
            input_ids,
            labels,
            position_ids,
            torch.from_numpy(boundaries),
            int(np.diff(boundaries).max()),
        )

    def pin_memory(self) -> Batch:
        """The same batch in memory from which a GPU copies by itself."""
        return Batch(
            self.input_ids.pin_memory(),
            self.labels.pin_memory(),
            self.position_ids.pin_memory(),
            self.cu_seqlens.pin_memory(),
            self.max_length,
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.cu_seqlens.to(device, non_blocking=True),
            self.max_length,
        )


class PackedDocuments:
    """The sequences of one split of one source: sequence r holds tokens [r * length, (r + 1) * length) of the token file.

    The last tokens of the file that fill no sequence are not used: fewer than `length` of them.
    """

    def __init__(self, documents: Documents, length: int) -> None:
        self.documents, self.length = documents, length
        self.sequences = max(
            0, (len(documents.tokens) - 1) // length
        )  # a sequence's last label is the next one's first token

    def _starts_within(self, begins: Integers) -> tuple[Integers, Integers]:
        """Of sequences that begin at these tokens, the first and the last + 1 document to start at place 1 .. length."""
        starts = self.documents.starts  # memory-mapped: a search reads a few pages
        return np.searchsorted(starts, begins + 1), np.searchsorted(
            starts, begins + self.length + 1
        )

    def targets(self, rows: int | Integers) -> int:
        """How many labels of these sequences are targets; found without reading their tokens."""
        begins = np.atleast_1d(np.asarray(rows, np.int64)) * self.length
        first, last = self._starts_within(begins)
        return int((self.length - (last - first)).sum())

    def read(self, row: int) -> Sequences:
        """One sequence, as `read_many` gives it."""
        ids, labels, positions = self.read_many(np.asarray([row], np.int64))
        return ids[0], labels[0], positions[0]

    def read_many(self, rows: Integers) -> Sequences:
        """(input ids, labels, position ids) of sequences, each [sequences, length].

        Raises `UserError` for a token that was not there when the store was written.
        """
        length, documents = self.length, self.documents
        begins = rows * length
        tokens = np.empty((len(rows), length + 1), np.int64)
        is_start = np.zeros((len(rows), length + 1), np.bool_)
        for number, (begin, first, last) in enumerate(
            zip(begins, *self._starts_within(begins), strict=True)
        ):
            tokens[number] = documents.tokens[begin : begin + length + 1]
            is_start[number, documents.starts[first:last] - begin] = True
        if len(rows) and tokens.max() > documents.largest:
            raise UserError(
                f"{documents.folder} holds token {tokens.max()} where {documents.largest} was the largest when it was "
                f"written, so it is damaged; {MAKE_AGAIN}"
            )
        labels = np.where(is_start[:, 1:], IGNORED, tokens[:, 1:])
        places = np.arange(length)
        positions = places - np.maximum.accumulate(np.where(is_start[:, :-1], places, 0), axis=1)
        return tokens[:, :-1], labels, positions


class TrainingSequences:
    """The sequences of a training run, by their index in the run. Threads may share it."""

    def __init__(
        self, store: Store, length: int, seed: int, shares: Sequence[float] | None = None
    ) -> None:
        """`shares` are of the store's sources (`training.mixture`); in proportion to their sizes if not given.

        Raises `UserError` for a source with less text than one sequence.
        """
        self.store, self.length = store, length
        self.sources = [
            PackedDocuments(store.documents(source, "train"), length)
            for source in store.info.sources
        ]
        for source, packed in zip(store.info.sources, self.sources, strict=True):
            if not packed.sequences:
                raise UserError(
                    f"text source {source.name} holds {source.train.tokens} tokens, fewer than one sequence of {length}; "
                    "lower training.sequence_length or give it more text."
                )
        self.names = [source.name for source in store.info.sources]
        rows = [packed.sequences for packed in self.sources]
        self.order = SequenceOrder(rows, shares or rows, seed)

    def check_batch(self, global_batch_size: int) -> None:
        """Raises `UserError` if all text together fills fewer sequences than one batch."""
        sequences = int(self.order.rows.sum())
        if sequences < global_batch_size:
            raise UserError(
                f"the training text fills {sequences} sequences of {self.length} tokens, fewer than "
                f"training.global_batch_size = {global_batch_size}; "
                "lower global_batch_size or sequence_length, or give more text."
            )

    def targets(self, indices: range) -> int:
        """The number of targets in these sequences of the run, over all processes: what the loss is divided by."""
        sources, rows = self.order.places(np.asarray(indices, np.int64))
        return sum(
            self.sources[source].targets(rows[sources == source]) for source in np.unique(sources)
        )

    def places(self, indices: range) -> list[tuple[str, int]]:
        """(source, sequence within it) of these sequences of the run."""
        sources, rows = self.order.places(np.asarray(indices, np.int64))
        return [(self.names[source], int(row)) for source, row in zip(sources, rows, strict=True)]

    def batch(self, indices: Sequence[int]) -> Batch:
        """These sequences of the run."""
        sources, rows = self.order.places(np.asarray(indices, np.int64))
        ids, labels, positions = (np.empty((len(rows), self.length), np.int64) for _ in range(3))
        for source in np.unique(sources):
            mine = sources == source
            ids[mine], labels[mine], positions[mine] = self.sources[source].read_many(rows[mine])
        return Batch.of(
            torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(positions)
        )


def stack(rows: list[Sequences]) -> Batch:
    """A batch from sequences as `PackedDocuments.read` gives them."""
    return Batch.of(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))
