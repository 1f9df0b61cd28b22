"""Traced tensors follow every element, and any part of what they describe can be read or given back."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cpt_merge.checkpoint.model_names import Rearranged, StoredTensors
from cpt_merge.checkpoint.pieces import Piece, RearrangedInfo, inverted
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.stored_shards import check_divisible
from cpt_merge.checkpoint.traced import NotMovedError, TracedTensor
from cpt_merge.core.errors import UserError

Pair = tuple[torch.Tensor, torch.Tensor]


def rearranged(seed: int) -> tuple[torch.Tensor, TracedTensor, dict[str, torch.Tensor]]:
    """Tensors joined and then rearranged at random: the values, the traced tensor, and the sources."""
    rng = random.Random(seed)
    shape = [rng.choice([1, 2, 3, 4, 6]) for _ in range(rng.choice([1, 2, 3]))]
    count = rng.choice([1, 2, 3])
    sources = {
        str(n): torch.arange(math.prod(shape)).reshape(shape) + 1000 * n for n in range(count)
    }
    traced = [TracedTensor.stored(name, shape) for name in sources]
    join, dim = rng.choice([torch.cat, torch.stack]), rng.randrange(len(shape))
    pair: Pair = join([*sources.values()], dim=dim), join(traced, dim=dim)
    for _ in range(rng.randrange(6)):
        pair = moved(rng, pair)
    assert isinstance(pair[1], TracedTensor)
    return pair[0], pair[1], sources


def moved(rng: random.Random, pair: Pair) -> Pair:
    """Both tensors after the same operation."""
    one, length = pair[0], pair[0].numel()
    dim, other = rng.randrange(one.ndim), rng.randrange(one.ndim)
    first = rng.choice([n for n in range(1, length + 1) if length % n == 0])
    second = rng.choice([n for n in range(1, length + 1) if length // first % n == 0])
    parts = rng.choice([1, 2, 3])
    number = rng.randrange(len(one.chunk(parts, dim)))
    operation = rng.choice([
        lambda t: torch.transpose(t, dim, other).contiguous(),
        lambda t: t.reshape(first, second, -1),
        lambda t: t.contiguous().view(-1, first),
        lambda t: t.chunk(parts, dim=dim)[number],
        lambda t: torch.unbind(t, dim=dim)[0] if t.ndim > 1 else t,
        lambda t: t.squeeze(0) if t.ndim > 1 else t,
        lambda t: t.unsqueeze(dim),
        lambda t: t.permute(*reversed(range(t.ndim))).clone(),
    ])  # fmt: skip
    return operation(pair[0]), operation(pair[1])


def filled(pieces: list[Piece], sources: dict[str, torch.Tensor], size: int) -> np.ndarray:
    """A flat tensor with the elements of these pieces, and -1 elsewhere."""
    flat = torch.full((size,), -1)
    for piece in pieces:
        block = sources[piece.source].flatten().clone()  # from element 0 of its storage
        flat.as_strided(piece.shape, piece.strides, piece.start).copy_(
            block.as_strided(piece.shape, piece.source_strides, piece.source_start)
        )
    return flat.numpy()


@pytest.mark.parametrize("seed", range(200))
def test_every_element_is_followed_in_both_directions_and_in_any_part(seed: int) -> None:
    values, traced, sources = rearranged(seed)
    assert traced.shape == values.shape
    assert np.array_equal(filled([*traced.pieces], sources, values.numel()), values.flatten())
    rng = random.Random(seed)
    first = rng.randrange(values.numel())
    last = rng.randrange(first, values.numel()) + 1
    parts = [part for piece in traced.pieces for part in piece.within(first, last)]
    assert all(first <= part.start and part.stop <= last for part in parts)
    assert np.array_equal(
        filled(parts, sources, values.numel())[first:last], values.flatten()[first:last]
    )
    assert sum(part.size for part in parts) == last - first
    for name, pieces in inverted({"all": traced.pieces}).items():
        back, source = filled([*pieces], {"all": values}, sources[name].numel()), sources[name]
        assert np.array_equal(back[back >= 0], source.flatten().numpy()[back >= 0])


def test_values_that_are_computed_are_refused() -> None:
    traced = TracedTensor.stored("a", (4, 6))
    with pytest.raises(NotMovedError, match="mul"):
        traced * 2
    with pytest.raises(NotMovedError, match="steps"):
        traced[::2]


@pytest.mark.parametrize("dtypes", [("BF16", "BF16"), ("BF16", "F32")])
def test_a_rearranged_tensor_is_read_from_the_files(
    dtypes: tuple[str, str], tmp_path: Path
) -> None:
    types = {"BF16": torch.bfloat16, "F32": torch.float32}
    stored = {
        name: torch.randn(3, 4).to(types[dtype]) for name, dtype in zip("ab", dtypes, strict=True)
    }
    save_file(stored, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    traced = torch.stack([TracedTensor.stored(name, (3, 4)) for name in "ab"]).transpose(1, 2)
    info = RearrangedInfo.of("both", (2, 4, 3), traced.pieces, checkpoint.tensors)
    assert info.dtype == info.copied_dtype == dtypes[1]
    checkpoint.tensors["both"] = info
    expected = torch.stack([tensor.float() for tensor in stored.values()]).transpose(1, 2)
    assert np.array_equal(checkpoint.read_float32("both"), expected)
    assert np.array_equal(checkpoint.read_float32("both", 1, 2), expected[1:])
    assert len(checkpoint.read_flat("both", 5, 9)) == 4


def test_a_stored_row_that_several_processes_would_share_is_refused(tmp_path: Path) -> None:
    """A transposed matrix: every stored row has an element of each row in memory."""
    shapes = {"a": (4, 6), "b": (4, 6)}
    swapped = TracedTensor.stored("a", (4, 6)).transpose(0, 1)
    joined = torch.cat([TracedTensor.stored(name, (4, 6)) for name in "ab"], dim=0)
    assert isinstance(swapped, TracedTensor)
    assert isinstance(joined, TracedTensor)
    check_divisible(StoredTensors({}, {"w": Rearranged((8, 6), joined.pieces)}, shapes), tmp_path)
    with pytest.raises(UserError, match="stores a, of which a row is in several rows of w"):
        check_divisible(
            StoredTensors({}, {"w": Rearranged((6, 4), swapped.pieces)}, shapes), tmp_path
        )
