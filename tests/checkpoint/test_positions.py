"""How many tokens a model reads at once, and that its tokenizer says so, too."""

import json
from pathlib import Path
from typing import Any

import pytest

from cpt_merge.checkpoint.positions import positions_of, raise_limit


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        ({"max_seq_len": 2048}, 2048),
        ({}, None),
        ({"text_config": {"max_position_embeddings": 8192}}, 8192),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        (
            {"max_position_embeddings": 131072, "rope_scaling": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            131072,
        ),
        (
            {"max_position_embeddings": 32768, "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
            131072,
        ),
        (
            {"max_position_embeddings": 131072, "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}},
            131072,
        ),
        (
            {"max_position_embeddings": 4096, "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_type": "default"}}},
            32768,
        ),
    ],
)  # fmt: skip
def test_how_far_the_positions_of_a_model_reach(
    config: dict[str, Any], positions: int | None
) -> None:
    assert positions_of(config) == positions


@pytest.mark.parametrize(
    ("limit", "before", "after", "written"),
    [
        (2048, 2048, 8192, 8192),
        (16384, 2048, 8192, 16384),
        (2048, 4096, 4096, 2048),
        (1024, 4096, 2048, 1024),
    ],
)
def test_the_tokenizer_s_limit_follows_positions_that_grew(
    tmp_path: Path, limit: int, before: int, after: int, written: int
) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"model_max_length": limit}))
    configs = ({"max_position_embeddings": positions} for positions in (after, before))
    raise_limit(tmp_path, *configs)
    assert json.loads(path.read_text()) == {"model_max_length": written}
