"""Trained shards become a checkpoint with the names, shapes and types of the one they started from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cpt_merge.checkpoint.export import LocalShard, export_shards
from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError

MASK = torch.tensor([True, False])


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"scale": (), "bias": (3,), "cube": (4, 3, 2)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def like(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    """The checkpoint that training started from, in bfloat16, with a mask that is not trained."""
    folder = tmp_path / "like"
    folder.mkdir()
    (folder / "config.json").write_text('{"tie_word_embeddings": false, "dtype": "bfloat16"}')
    stored = {name: torch.zeros_like(values).bfloat16() for name, values in weights.items()}
    save_file({**stored, "mask": MASK}, folder / "model.safetensors")
    return folder


def shards_of(weights: dict[str, torch.Tensor]) -> list[LocalShard]:
    return [LocalShard(name, tuple(values.shape), 0, values) for name, values in weights.items()]


def export(shards: list[LocalShard], like: Path, **more: Any) -> dict[str, torch.Tensor]:
    out = like.with_name("out")
    export_shards(shards, like, like, out, Ranks(), **more)
    return load_file(out / "model.safetensors")


def test_weights_of_any_shape_are_rounded_once_to_the_types_of_the_start(
    weights: dict[str, torch.Tensor], like: Path
) -> None:
    empty = LocalShard("bias", (3,), 3, torch.zeros(0))
    found = export([*shards_of(weights), empty], like)
    assert {name: values.dtype for name, values in found.items()} == {
        **dict.fromkeys(weights, torch.bfloat16),
        "mask": torch.bool,
    }
    assert all(torch.equal(found[name], values.bfloat16()) for name, values in weights.items())
    assert torch.equal(found["mask"], MASK)


def test_another_type_on_request(weights: dict[str, torch.Tensor], like: Path) -> None:
    found = export(shards_of(weights), like, dtype="float32")
    assert all(torch.equal(found[name], values) for name, values in weights.items())
    config = json.loads((like.with_name("out") / "config.json").read_text())
    assert config == {"tie_word_embeddings": False, "dtype": "float32"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, r"0 to 3 of bias were never written"),
        ({"bias": torch.zeros(7)}, r"the trained bias has shape \(7,\), .* has shape \(3,\)"),
        ({"strange": torch.zeros(2)}, r"the trained strange .* has no such tensor"),
        ({"bias": torch.tensor([0, np.nan, 0])}, r"bias would hold NaN or Inf"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_nothing_is_published(
    weights: dict[str, torch.Tensor], like: Path, change: dict[str, Any], message: str
) -> None:
    changed = {name: values for name, values in (weights | change).items() if values is not None}
    with pytest.raises(UserError, match=message):
        export(shards_of(changed), like)
    assert not like.with_name("out").exists()


def test_a_row_from_two_ranks_is_named(weights: dict[str, torch.Tensor], like: Path) -> None:
    again = LocalShard("bias", (3,), 1, torch.zeros(2))
    with pytest.raises(UserError, match="bias were written twice"):
        export([*shards_of(weights), again], like)
