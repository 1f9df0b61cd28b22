"""Tokenizers of real models, from installed packages: LLaMA-2's kind with 32,000 pieces."""

import importlib.util
import json
from pathlib import Path

import pytest

from checkpoint.vocabulary import VocabularyMap
from tests.tokenizer_ext.small_tokenizers import CONFIG, RecordingTracker, write_base
from tokenizer_ext import run


def mistral_model() -> bytes:
    """`tokenizer.model.v1` of Mistral (Apache-2.0), without importing the package, which needs others."""
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("mistral-common is not installed (pip install --no-deps mistral-common)")
    return (Path(spec.submodule_search_locations[0]) / "data" / "tokenizer.model.v1").read_bytes()


@pytest.mark.slow
def test_mistral_keeps_every_law(corpus, tmp_path) -> None:
    """The stage proves its laws itself: whitespace runs at -1e9, 256 bytes, Han and Hangul pieces of its own."""
    base = write_base(tmp_path / "base", 32_000, proto=mistral_model(), add_bos_token=True, bos_token="<s>")
    (tmp_path / "out").mkdir()
    run(CONFIG, base, None, corpus, tmp_path / "out", RecordingTracker())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert all(proof["checked"] and not proof["failures"] for proof in report["proofs"])
    assert VocabularyMap.load(tmp_path / "out").base_rows == 32_000
