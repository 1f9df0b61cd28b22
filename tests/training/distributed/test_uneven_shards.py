"""Models whose rows and widths no number of processes divides, from the first step to the merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.vocabulary_map import NewPiece, VocabularyMap
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.files import merge_directories
from cpt_merge.merge.plan import MergeInputs
from cpt_merge.tracking import Tracker
from cpt_merge.training.saved import choose_steps, export_checkpoints
from tests.distributed import run_ranks
from tests.training.runs import Job, assert_same_weights, train

BASE_ROWS, PIECES, ROWS = 297, 300, 301
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
CHANGES: dict[str, Any] = {
    "global_batch_size": 15, "micro_batch_size": 1, "tokens": 32 * 15 * 5,
    "checkpoints": {"every": 2},
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """An extended model of 301 rows, and the pair of 297 rows from which it comes."""

    start: Path
    base: Path
    chat: Path


def build(rows: int, tied: bool) -> LlamaForCausalLM:
    """Neither 3 nor 5 divides any side of a matrix: 32, 16, 46 and the rows."""
    config = LlamaConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=46, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(1)
    return LlamaForCausalLM(config)


def write_tokenizer(model: Path, pieces: int, out: Path) -> None:
    """The tokenizer of the fixtures' model, with its first pieces alone."""
    (out / "tokenizer_config.json").write_bytes((model / "tokenizer_config.json").read_bytes())
    if pieces == PIECES:
        (out / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
        return
    content = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = {piece: at for piece, at in content["model"]["vocab"].items() if at < pieces}
    merges = [pair for pair in content["model"]["merges"] if "".join(pair) in vocabulary]
    content["model"] |= {"vocab": vocabulary, "merges": merges}
    (out / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def make_family(folder: Path, model: Path, tied: bool) -> Family:
    family = Family(*(folder / name for name in ("start", "base", "chat")))
    start = build(ROWS, tied)
    for path, rows in ((family.start, ROWS), (family.base, BASE_ROWS), (family.chat, BASE_ROWS)):
        copy = build(rows, tied)
        weights = {
            name: values[:rows] if name in VOCABULARY else values
            for name, values in start.state_dict().items()
        }
        if path == family.chat:
            weights = {name: one + 0.05 * torch.randn_like(one) for name, one in weights.items()}
        if tied:
            weights[VOCABULARY[1]] = weights[VOCABULARY[0]]
        copy.load_state_dict(weights)
        copy.save_pretrained(path)
        write_tokenizer(model, min(rows, PIECES), path)
    pieces = AutoTokenizer.from_pretrained(family.start).convert_ids_to_tokens(
        range(BASE_ROWS, PIECES)
    )
    new = [NewPiece(BASE_ROWS + at, piece, [3, 4]) for at, piece in enumerate(pieces)]
    VocabularyMap(BASE_ROWS, ROWS, new, [], [PIECES]).save(family.start)
    return family


Runs = Callable[[bool], tuple[Family, dict[int, float]]]


@pytest.fixture(scope="module")
def alone(model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A family, tied or not, and the losses of one process."""

    @cache
    def run(tied: bool) -> tuple[Family, dict[int, float]]:
        folder = tmp_path_factory.mktemp("tied" if tied else "untied")
        family = make_family(folder, model, tied)
        job = Job(family.start, store, folder / "run", CHANGES)
        return family, run_ranks(train, 1, job)[0]

    return run


GROUPS = [(backend, size) for backend in ("fsdp2", "zero1", "zero2", "zero3") for size in (3, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("backend", "size"), GROUPS)
def test_uneven_shards_train_save_resume_export_and_merge(
    backend: str, size: int, tied: bool, alone: Runs, store: Path, tmp_path: Path
) -> None:
    family, expected = alone(tied)
    merge = MergeInputs(family.start, family.base, family.chat, family.start)
    job = Job(family.start, store, tmp_path / "whole", CHANGES, backend)
    whole = run_ranks(train, size, job)[0]
    assert whole == pytest.approx(expected, rel=2e-4)

    parts = replace(job, out=tmp_path / "parts", stop_after=3)
    first = run_ranks(train, size, parts)[0]
    second = run_ranks(train, size, replace(parts, stop_after=0, hook=merge))[0]
    assert {**first, **second} == whole
    assert len(second) < len(whole)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")

    exported = tmp_path / "whole" / "cpt"
    assert tensors(exported) == tensors(family.start)
    checkpoints = choose_steps(tmp_path / "whole" / "checkpoints", None, None)
    export_checkpoints(job.config, family.start, family.start, checkpoints, tmp_path / "cpt")
    assert_same_weights(tmp_path / "whole", tmp_path)

    merge_directories(MergeConfig(), replace(merge, cpt=exported), tmp_path / "files", Tracker())
    found, wanted = tmp_path / "parts" / "merged", tmp_path / "files"
    assert (found / "model.safetensors").read_bytes() == (wanted / "model.safetensors").read_bytes()


def tensors(model: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Types and shapes of a checkpoint, by name."""
    return {name: (one.dtype, one.shape) for name, one in Checkpoint.open(model).tensors.items()}
