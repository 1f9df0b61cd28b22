"""Packed sequences: windows of the token files, in which documents do not see each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from cpt_merge.core.errors import UserError
from cpt_merge.data.order import ChangingOrder
from cpt_merge.data.pairs import Pairs, Preference, Reference, replies_of
from cpt_merge.data.store import MAKE_AGAIN, Documents, MaskedCounts, Store

IGNORED = -100  # the label of a position without target

Integers = npt.NDArray[np.int64]
Sequences = tuple[Integers, Integers, Integers]  # input ids, labels, position ids


@dataclass(frozen=True)
class Batch:
    """Sequences for the model. The first three tensors have shape [sequences, length], int64.

    `labels[i, t]` is the token after `input_ids[i, t]` in the same document, IGNORED at the last
    token of a document. `position_ids` begin at 0 in every document, which tells transformers where
    documents begin. `cu_seqlens` (int32) are the positions in the flattened batch at which a
    document or a sequence begins, from 0 to sequences * length; `max_length` is the largest
    distance between two of them. Attention kernels for packed sequences need both; they are
    computed here so that no kernel waits for the device. `lengths` are the same distances. With
    `pairs`, the documents are replies to compare.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_length: int
    lengths: tuple[int, ...]
    pairs: Pairs | None = None

    @staticmethod
    def of(input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor) -> Batch:
        """A batch on the CPU, with the boundaries that follow from the positions."""
        flat = position_ids.numpy().ravel()
        boundaries = np.append(np.flatnonzero(flat == 0), flat.size).astype(np.int32)
        lengths = tuple(np.diff(boundaries).tolist())
        cu_seqlens = torch.from_numpy(boundaries)
        return Batch(input_ids, labels, position_ids, cu_seqlens, max(lengths), lengths)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies asynchronously."""
        return self._mapped(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def _mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        ids, labels, positions, boundaries = map(
            change, (self.input_ids, self.labels, self.position_ids, self.cu_seqlens)
        )
        pairs = self.pairs and self.pairs.mapped(change)
        return Batch(ids, labels, positions, boundaries, self.max_length, self.lengths, pairs)

    def with_pairs(self, beta: float, reference: npt.NDArray[np.float32] | None) -> Batch:
        """The same on the CPU, as pairs; `reference` [pairs, 2] is in their order."""
        reply, count = replies_of((self.labels != IGNORED).numpy().ravel(), self.cu_seqlens.numpy())
        values = None if reference is None else torch.from_numpy(reference)
        return replace(self, pairs=Pairs(torch.from_numpy(reply), count, beta, values))


class PackedDocuments:
    """The sequences of one split of one source.

    Sequence r is tokens [r * length, (r + 1) * length) of the token file. The last tokens of the
    file, fewer than `length`, are not used.
    """

    def __init__(
        self, documents: Documents, length: int, preference: Preference | None = None
    ) -> None:
        """With `preference`, the documents are replies to compare.

        Raises `UserError` for conversations that fill sequences of another length.
        """
        counts = documents.counts
        if isinstance(counts, MaskedCounts) and counts.length != length:
            raise UserError(
                f"the conversations in {documents.folder} fill sequences of {counts.length} tokens "
                f"and not of {length}; {MAKE_AGAIN}"
            )
        self.documents, self.length, self.preference = documents, length, preference
        # the last label of a sequence is the first token of the next one
        self.sequences = max(0, (len(documents.tokens) - 1) // length)

    def _starts_within(self, begins: Integers) -> tuple[Integers, Integers]:
        """The range of documents that start at positions 1 .. length of each sequence."""
        starts = self.documents.starts  # memory-mapped: a search reads a few pages
        first, last = (np.searchsorted(starts, begins + place) for place in (1, self.length + 1))
        return first, last

    @cached_property
    def reference(self) -> Reference:
        """The log probabilities that the reference model gives to the replies."""
        assert self.preference
        return Reference.read(self.preference.path(self.documents.folder))

    def targets(self, numbers: int | Integers) -> int:
        """How many labels of these sequences are targets, without reading their tokens.

        Where replies are compared, how many pairs there are.
        """
        if self.preference:
            return self.reference.pairs(np.atleast_1d(np.asarray(numbers, np.int64)))
        begins = np.atleast_1d(np.asarray(numbers, np.int64)) * self.length
        trained = self.documents.trained
        if trained is not None:  # bits: no tokens are read for them
            windows = (trained.read(begin + 1, begin + self.length + 1) for begin in begins)
            return sum(int(window.sum()) for window in windows)
        first, last = self._starts_within(begins)
        return int((self.length - (last - first)).sum())

    def read(self, number: int) -> Sequences:
        """One sequence, as `read_many` gives it."""
        ids, labels, positions = self.read_many(np.asarray([number], np.int64))
        return ids[0], labels[0], positions[0]

    def read_many(self, numbers: Integers) -> Sequences:
        """(input ids, labels, position ids) of sequences, each of shape [sequences, length].

        Raises `UserError` if a token is larger than when the store was written.
        """
        length, documents = self.length, self.documents
        begins = numbers * length
        tokens = np.empty((len(numbers), length + 1), np.int64)
        is_start = np.zeros((len(numbers), length + 1), np.bool_)
        windows = zip(begins, *self._starts_within(begins), strict=True)
        for place, (begin, first, last) in enumerate(windows):
            tokens[place] = documents.tokens[begin : begin + length + 1]
            is_start[place, documents.starts[first:last] - begin] = True
        if len(numbers) and tokens.max() > documents.largest:
            raise UserError(
                f"{documents.folder} contains token {tokens.max()}, but {documents.largest} was "
                f"the largest when it was written, so it is damaged; {MAKE_AGAIN}"
            )
        labels = np.where(is_start[:, 1:], IGNORED, tokens[:, 1:])
        if documents.trained is not None:
            for place, begin in enumerate(begins):
                counted = documents.trained.read(begin + 1, begin + length + 1)
                labels[place, ~counted] = IGNORED
        places = np.arange(length)
        positions = places - np.maximum.accumulate(np.where(is_start[:, :-1], places, 0), axis=1)
        return tokens[:, :-1], labels, positions


class TrainingSequences:
    """The sequences of a training run, by their index in the run. Several threads may use it."""

    def __init__(
        self,
        store: Store,
        length: int,
        seed: int,
        shares: Sequence[float] | None = None,
        preference: Preference | None = None,
        changes: Sequence[tuple[int, Sequence[float]]] = (),
    ) -> None:
        """`shares` of the sources of the store; without them, in proportion to their sizes.

        `changes`: later sequences of the run, and the shares from there on. Raises `UserError` for
        a source with less text than one sequence.
        """
        self.store, self.length, self.preference = store, length, preference
        self.sources = [
            PackedDocuments(store.documents(source, "train"), length, preference)
            for source in store.info.sources
        ]
        for source, packed in zip(store.info.sources, self.sources, strict=True):
            if not packed.sequences:
                raise UserError(
                    f"text source {source.name} has {source.train.tokens} tokens, fewer than one "
                    f"sequence of {length}; lower training.sequence_length or give it more text."
                )
        self.names = [source.name for source in store.info.sources]
        counts = [packed.sequences for packed in self.sources]
        self.order = ChangingOrder(counts, [(0, shares or counts), *changes], seed)

    def check_batch(self, global_batch_size: int) -> None:
        """Raise `UserError` if all text fills fewer sequences than one batch."""
        sequences = int(self.order.counts.sum())
        if sequences < global_batch_size:
            raise UserError(
                f"the training text fills {sequences} sequences of {self.length} tokens, fewer "
                f"than training.global_batch_size = {global_batch_size}; "
                "lower global_batch_size or sequence_length, or give more text."
            )

    def targets(self, indices: range) -> int:
        """The number of targets in these sequences of the run, by which the loss is divided."""
        sources, numbers = self.order.places(np.asarray(indices, np.int64))
        return sum(
            self.sources[source].targets(numbers[sources == source])
            for source in np.unique(sources)
        )

    def places(self, indices: range) -> list[tuple[str, int]]:
        """(source, sequence within it) of these sequences of the run."""
        found = zip(*self.order.places(np.asarray(indices, np.int64)), strict=True)
        return [(self.names[source], int(number)) for source, number in found]

    def batch(self, indices: Sequence[int]) -> Batch:
        """These sequences of the run, as pairs where replies are compared."""
        batch = self.documents(indices)
        if self.preference is None:
            return batch
        places = zip(*self.order.places(np.asarray(indices, np.int64)), strict=True)
        references = [self.sources[source].reference.sequence(number) for source, number in places]
        return batch.with_pairs(self.preference.beta, np.concatenate(references))

    def documents(self, indices: Sequence[int]) -> Batch:
        """The documents of these sequences of the run."""
        sources, numbers = self.order.places(np.asarray(indices, np.int64))
        columns = tuple(np.empty((len(numbers), self.length), np.int64) for _ in range(3))
        for source in np.unique(sources):
            mine = sources == source
            read = self.sources[source].read_many(numbers[mine])
            for column, values in zip(columns, read, strict=True):
                column[mine] = values
        return Batch.of(*map(torch.from_numpy, columns))


def stack(places: Sequence[tuple[PackedDocuments, int]], with_reference: bool = True) -> Batch:
    """A batch of sequences, each by its documents and its number.

    Where replies are compared, `with_reference` says whether there is a reference yet.
    """
    columns = zip(*(packed.read(number) for packed, number in places), strict=True)
    batch = Batch.of(*(torch.from_numpy(np.stack(column)) for column in columns))
    preference = places[0][0].preference
    if preference is None:
        return batch
    references = [packed.reference.sequence(n) for packed, n in places if with_reference]
    return batch.with_pairs(preference.beta, np.concatenate(references) if references else None)
