"""Packed sequences: every token once, documents apart, targets counted without reading."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cpt_merge.data.packing import IGNORED, PackedDocuments, stack
from cpt_merge.data.store import Documents, SplitWriter


def make_documents(folder: Path, lengths: list[int]) -> Documents:
    """Documents of the given lengths whose tokens are 1, 2, 3, ... over all."""
    writer = SplitWriter(folder, "uint16")
    counted = np.asarray(lengths)
    writer.add(np.arange(1, counted.sum() + 1, dtype=np.uint16), counted, 3 * counted)
    return Documents(folder, "uint16", writer.close())


LENGTHS = [5, 1, 9, 3, 30, 2, 2, 8]


@pytest.mark.parametrize("length", [4, 7, 8, 10])
def test_rows_hold_consecutive_tokens_and_restart_positions_with_each_document(
    tmp_path: Path, length: int
) -> None:
    documents = make_documents(tmp_path, LENGTHS)
    packed = PackedDocuments(documents, length)
    assert packed.sequences == (sum(LENGTHS) - 1) // length
    starts = set(np.cumsum([0, *LENGTHS]).tolist())
    for row in range(packed.sequences):
        ids, labels, positions = packed.read(row)
        assert ids.tolist() == list(range(row * length + 1, (row + 1) * length + 1))
        for t in range(length):
            place = row * length + t
            assert labels[t] == (IGNORED if place + 1 in starts else ids[t] + 1)
            begin = max([s for s in starts if s <= place] + [row * length])
            assert positions[t] == place - max(begin, row * length)


@pytest.mark.parametrize("length", [4, 7, 10])
def test_targets_are_counted_without_reading(tmp_path: Path, length: int) -> None:
    packed = PackedDocuments(make_documents(tmp_path, LENGTHS), length)
    for row in range(packed.sequences):
        assert packed.targets(row) == (packed.read(row)[1] != IGNORED).sum()


@pytest.mark.parametrize("length", [4, 7, 10])
def test_a_batch_says_where_documents_and_rows_begin(tmp_path: Path, length: int) -> None:
    packed = PackedDocuments(make_documents(tmp_path, LENGTHS), length)
    chosen = [2, 0, 3]
    batch = stack([(packed, row) for row in chosen])
    starts = np.cumsum([0, *LENGTHS])
    expected = [
        number * length + place
        for number, row in enumerate(chosen)
        for place in range(length)
        if place == 0 or row * length + place in starts
    ]
    assert batch.cu_seqlens.tolist() == [*expected, len(chosen) * length]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_length == np.diff(batch.cu_seqlens).max()
