"""A rank that is traced alone holds, moves, reads and writes what real processes do."""

import dataclasses
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.dry_run import MODELS as PUBLISHED
from benchmarks.dry_run import NODE, compare, configuration
from benchmarks.fake_ranks import RankCase, Trace, trace_fake, trace_rank, write_shapes
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.training.config import TrainingConfig
from tests.distributed import run_ranks

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 131, "hidden_size": 64,
    "intermediate_size": 101, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {
    **LLAMA, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 16, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32,
}  # fmt: skip
MODELS = {"dense": LLAMA, "tied": {**LLAMA, "tie_word_embeddings": True}, "experts": EXPERTS}


def case_of(folder: Path, model: str, ranks: int, replicas: int = 1, **changes: Any) -> RankCase:
    write_shapes(MODELS[model], folder)
    config = {"sequence_length": 64, "global_batch_size": ranks, "attention": "flash", **changes}
    return RankCase(folder, TrainingConfig(tokens=10**6, **config), ranks, replicas)


def real_trace(case: RankCase) -> Trace:
    torch.distributed.init_process_group("gloo")
    found = trace_rank(dataclasses.replace(case, rank=torch.distributed.get_rank()))
    torch.distributed.destroy_process_group()
    return found


def without_peak(trace: Trace) -> Trace:
    """A CPU's attention and matrix products take other memory."""
    return dataclasses.replace(trace, peak={})


@pytest.mark.parametrize(
    ("model", "ranks", "replicas", "changes"),
    [
        ("dense", 2, 1, {}),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (
                ("dense", 3, 1, {"activation_checkpointing": "full", "global_batch_size": 6}),
                ("tied", 5, 1, {"activation_checkpointing": "selective"}),
                ("experts", 3, 1, {}),
                ("dense", 5, 1, {"lora": {"rank": 3}}),
                ("dense", 3, 1, {"optimizer": {"moments": "8bit"}}),
                ("dense", 4, 2, {"precision": "pure-bf16"}),
                ("tied", 3, 1, {"phases": [{"train": "vocabulary"}]}),
            )
        ),
    ],
)
def test_a_rank_traced_alone_is_one_of_many(
    model: str, ranks: int, replicas: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    case = case_of(tmp_path, model, ranks, replicas, **changes)
    real = run_ranks(real_trace, ranks, case)
    alone = [trace_fake(dataclasses.replace(case, rank=rank)) for rank in range(ranks)]
    assert [without_peak(one) for one in alone] == [without_peak(one) for one in real]
    assert real[-1].held == real[0].last != real[0].held
    if ranks % 2 == 0:  # the padding of unequal shards is much of such small models
        row = compare("", case.model, case.config, ranks, replicas, alone[0])
        assert row.traffic == pytest.approx(sum(alone[0].traffic.values()), rel=0.01)


@pytest.mark.parametrize(
    ("model", "ranks"), [("dense", 3), pytest.param("experts", 5, marks=pytest.mark.slow)]
)
def test_ranks_read_and_write_every_element_once(model: str, ranks: int, tmp_path: Path) -> None:
    case = case_of(tmp_path, model, ranks)
    traces = [trace_fake(dataclasses.replace(case, rank=rank)) for rank in range(ranks)]
    sizes = {name: info.size for name, info in Checkpoint.open(case.model).tensors.items()}
    for kind in ("reads", "exports"):
        counts: Counter[str] = Counter()
        ends: dict[str, set[tuple[int, int]]] = {}
        for trace in traces:
            for name, start, stop in getattr(trace, kind):
                counts[name] += stop - start
                if stop > start:
                    ends.setdefault(name, set()).add((start, stop))
        assert counts == sizes
        for pieces in ends.values():
            ordered = sorted(pieces)
            assert all(before[1] == after[0] for before, after in pairwise(ordered))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "ranks", "setting"),
    [
        ("LLaMA-2-7B", 64, "selective"),
        ("LLaMA-2-7B", 64, "HSDP"),
        ("LLaMA-2-7B", 8, "LoRA"),
        ("LLaMA-2-70B", 512, "full"),  # gradients of a layer weigh more than its activations
        ("Qwen3-30B-A3B", 64, "full"),
        ("Gemma-3-4B", 2, "full"),
    ],
)
def test_the_estimate_is_near_the_peak_of_torchs_tracker(
    model: str, ranks: int, setting: str, tmp_path: Path
) -> None:
    """At real widths, with few layers, so that errors in what a layer takes are not hidden."""
    config = {**PUBLISHED[model]}
    text = config if "text_config" not in config else {**config["text_config"]}
    text["num_hidden_layers"] = 4
    write_shapes(config if text is config else {**config, "text_config": text}, tmp_path)
    case = RankCase(
        tmp_path, configuration(setting, ranks), ranks, ranks // NODE if setting == "HSDP" else 1
    )
    trace = trace_fake(case)
    row = compare(model, tmp_path, case.config, ranks, case.replicas, trace)
    assert row.peak == pytest.approx(trace.peak["Total"], rel=0.02)
