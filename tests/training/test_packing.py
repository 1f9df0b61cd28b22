"""Packed rows: every token once, documents apart, targets counted without reading."""

from pathlib import Path

import numpy as np
import pytest

from training.packing import IGNORED, PackedDocuments
from training.store import Documents, DocumentWriter


def make_documents(folder: Path, lengths: list[int]) -> Documents:
    """Documents of the given lengths whose tokens are 1, 2, 3, ... over all."""
    writer, token = DocumentWriter(folder, "uint16"), 1
    for length in lengths:
        writer.add(list(range(token, token + length)), text_bytes=3 * length)
        token += length
    writer.close()
    return Documents(folder, "uint16")


LENGTHS = [5, 1, 9, 3, 30, 2, 2, 8]


@pytest.mark.parametrize("length", [4, 7, 8, 10])
def test_rows_hold_consecutive_tokens_and_restart_positions_with_each_document(tmp_path: Path, length: int) -> None:
    documents = make_documents(tmp_path, LENGTHS)
    packed = PackedDocuments(documents, length)
    assert packed.rows == (sum(LENGTHS) - 1) // length
    starts = set(np.cumsum([0, *LENGTHS]).tolist())
    for row in range(packed.rows):
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
    for row in range(packed.rows):
        assert packed.targets(row) == (packed.read(row)[1] != IGNORED).sum()
