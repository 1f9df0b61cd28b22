"""Packed rows: windows of the token files, in which documents do not see each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from core.errors import UserError
from training.order import RowOrder
from training.store import Documents, Store

IGNORED = -100  # a label that is no target

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Rows for the model; the first three tensors are of shape [rows, sequence_length], int64.

    `labels[i, t]` is the token after `input_ids[i, t]` in the same document, or IGNORED at a document's last token;
    `position_ids` begin at 0 with every document, which is how transformers knows where documents part.
    `cu_seqlens` (int32) are the places in the flattened batch at which a document or a row begins, and its end:
    0 first, rows * sequence_length last. `max_length` is the largest distance between two of them. Both are what
    attention kernels take for packed rows, made here so that no kernel has to wait for the device.
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
        return Batch(input_ids, labels, position_ids, torch.from_numpy(boundaries), int(np.diff(boundaries).max()))

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
    """The rows of one split of one source: row r holds tokens [r * length, (r + 1) * length) of the token file.

    The last tokens of the file that fill no row are not used: fewer than `length` of them.
    """

    def __init__(self, documents: Documents, length: int) -> None:
        self.documents, self.length = documents, length
        self.rows = max(
            0, (len(documents.tokens) - 1) // length
        )  # the last label of a row is the next row's first token

    def starts_within(self, row: int) -> Ids:
        """Positions in the row (1 .. length) at which a document starts; position 0 is left out."""
        begin = row * self.length
        starts = self.documents.starts
        first, last = np.searchsorted(starts, [begin + 1, begin + self.length + 1])
        return np.asarray(starts[first:last] - begin, dtype=np.int64)

    def targets(self, row: int) -> int:
        """How many labels of the row are targets; found without reading its tokens."""
        return self.length - len(self.starts_within(row))

    def read(self, row: int) -> tuple[Ids, Ids, Ids]:
        """(input ids, labels, position ids) of a row, each [length]."""
        begin = row * self.length
        tokens = self.documents.tokens[begin : begin + self.length + 1].astype(np.int64)
        starts = self.starts_within(row)
        labels = tokens[1:].copy()
        labels[starts - 1] = IGNORED
        inside = starts[starts < self.length]
        origin = np.zeros(self.length, dtype=np.int64)
        origin[inside] = inside
        positions = np.arange(self.length) - np.maximum.accumulate(origin)
        return tokens[:-1], labels, positions


class TrainingRows:
    """The rows of a training run, by their index in the run."""

    def __init__(self, store: Store, length: int, seed: int) -> None:
        self.sources = [PackedDocuments(store.documents(source, "train"), length) for source in store.info.sources]
        for source, packed in zip(store.info.sources, self.sources, strict=True):
            if not packed.rows:
                raise UserError(
                    f"text source {source.name} holds {source.train.tokens} tokens, fewer than one row of {length}; "
                    "lower training.sequence_length or give it more text."
                )
        weights = [float(packed.rows) for packed in self.sources]
        self.order = RowOrder([packed.rows for packed in self.sources], weights, seed)

    def targets(self, indices: range) -> int:
        """The number of targets in these rows of the run, over all processes: what the loss is divided by."""
        places = (self.order.place(index) for index in indices)
        return sum(self.sources[place.source].targets(place.row) for place in places)

    def batch(self, indices: list[int]) -> Batch:
        """These rows of the run."""
        places = [self.order.place(index) for index in indices]
        return stack([self.sources[place.source].read(place.row) for place in places])


def stack(rows: list[tuple[Ids, Ids, Ids]]) -> Batch:
    """A batch from rows as `PackedDocuments.read` gives them."""
    return Batch.of(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))
