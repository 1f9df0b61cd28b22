"""Packed documents do not see each other, whatever the batch size and the attention."""

import itertools
from pathlib import Path

import pytest
import torch

from tests.training.conftest import CONFIG
from training.config import TrainingConfig
from training.model import build_model, load_weights
from training.packing import IGNORED, Batch, PackedDocuments, stack
from training.store import Store


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [2, 3, 5])
def test_a_packed_row_costs_what_its_documents_cost_alone(attention: str, rows: int, model: Path, store: Path) -> None:
    module = build_model(model, TrainingConfig(**{**CONFIG, "attention": attention}))
    load_weights(module, model, torch.device("cpu"))
    opened = Store.open(store)
    packed = PackedDocuments(opened.documents(opened.info.sources[0], "train"), 100)
    batch = stack([packed.read(row) for row in range(rows)])
    assert (batch.position_ids == 0).sum() > rows, "the rows hold several documents"
    with torch.no_grad():
        together = module(batch)
        alone = sum(module(part) for part in documents_of(batch))
    assert together.item() == pytest.approx(float(alone), rel=1e-5)


def documents_of(batch: Batch) -> list[Batch]:
    """Each (part of a) document of the batch as a batch of its own."""
    parts = []
    for row in range(len(batch.input_ids)):
        starts = [*torch.where(batch.position_ids[row] == 0)[0].tolist(), batch.input_ids.shape[1]]
        for start, stop in itertools.pairwise(starts):
            cut = (tensor[row : row + 1, start:stop] for tensor in (batch.input_ids, batch.labels, batch.position_ids))
            parts.append(Batch.of(*cut))
    assert all((part.labels[:, :-1] != IGNORED).all() for part in parts)
    return parts
