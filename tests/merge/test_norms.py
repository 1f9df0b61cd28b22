"""Norms and cosines from a sample of every tensor."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cpt_merge.merge.config import MergeConfig
from cpt_merge.merge.extract import extract
from cpt_merge.merge.files import merge_directories
from cpt_merge.merge.norms import PERIOD, WINDOW, Sums, sampled_rows, total, windows
from cpt_merge.merge.plan import MergeInputs

SIZE = 3 * PERIOD + 1000


def positions(start: int, count: int) -> list[int]:
    return [start + at for part in windows(start, count) for at in range(*part.indices(count))]


@pytest.mark.parametrize("step", [SIZE, PERIOD, PERIOD // 3 + 7, WINDOW // 2 + 1])
def test_the_sample_does_not_depend_on_how_a_tensor_is_cut(step):
    parts = [positions(start, min(step, SIZE - start)) for start in range(0, SIZE, step)]
    expected = [at for at in range(SIZE) if at % PERIOD < WINDOW]
    assert [at for part in parts for at in part] == expected


def test_the_first_elements_of_every_tensor_are_in_the_sample():
    assert positions(0, 5) == [0, 1, 2, 3, 4]
    assert sampled_rows(np.arange(2), 1 << 20)[0]


@pytest.mark.parametrize("width", [64, 4096, 5120, WINDOW])
def test_about_one_row_in_sixteen_is_in_the_sample(width):
    assert sampled_rows(np.arange(200_000), width).mean() == pytest.approx(1 / 16, rel=0.05)


def test_sums_of_a_sample_stand_for_all_elements():
    values = np.ones(10, np.float32)
    sums = Sums(elements=160)
    sums.count(2 * values, values, values)
    whole = total([sums, sums])
    assert (whole.base, whole.vector, whole.elements) == (320, 320, 320)
    assert (whole.vector_share, whole.contained) == (1, 1)


MATRIX = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, chat and cpt with a matrix of several periods; chat is 10 % and cpt 20 % away."""
    root, random = tmp_path_factory.mktemp("large"), torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (300, 64),
        MATRIX: (9000, 64),
        "lm_head.weight": (300, 64),
    }
    base = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    for model, length in (("base", 0.0), ("chat", 0.1), ("cpt", 0.2)):
        moved = {n: w + length * torch.randn(w.shape, generator=random) for n, w in base.items()}
        (root / model).mkdir()
        save_file(moved, root / model / "model.safetensors")
        config = {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": 300}
        (root / model / "config.json").write_text(json.dumps(config))
    return root


@pytest.mark.parametrize("statistics", ["sample", "all"])
@pytest.mark.parametrize("with_base", [True, False])
def test_shares_of_a_vector_and_of_its_pair_are_those_of_all_elements(
    large: Path, tmp_path: Path, statistics: str, with_base: bool
) -> None:
    config = MergeConfig(statistics=statistics)
    inputs = MergeInputs(large / "cpt", large / "base", large / "chat")
    if not with_base:
        extract(large / "base", large / "chat", tmp_path / "vector", "float32")
        inputs = MergeInputs(large / "cpt", vector=tmp_path / "vector")
    merge_directories(config, inputs, tmp_path / "out")
    tensor = json.loads((tmp_path / "out" / "merge_report.json").read_text())["tensors"][MATRIX]
    assert tensor["vector"] == pytest.approx(0.1, rel=0.02)
    assert tensor.get("change", 0.2) == pytest.approx(0.2, rel=0.02)
    assert ("change" in tensor) == with_base
