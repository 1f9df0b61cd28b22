"""Greedy continuations equal those of transformers' `generate`, with whole and sharded models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpt_merge.data.store import Store
from cpt_merge.training.callbacks.continuations import (
    COLUMNS,
    Prompt,
    continuation_rows,
    continue_greedily,
    prompts_from,
)
from tests.distributed import run_ranks

NONE = -1  # an end that no model gives


def last_logits(model: torch.nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda ids, last: model(input_ids=ids, use_cache=False).logits[
        torch.arange(len(ids)), last
    ]


def alone(chosen: Tensor) -> Tensor:
    return chosen


def as_on_rank_0(chosen: Tensor) -> Tensor:
    dist.broadcast(chosen, src=0)
    return chosen


def load(path: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model


def test_equal_to_generate_whatever_the_lengths(model: Path) -> None:
    whole = load(model)
    prompts = [[1, 5, 9], [1, 7], [1, 30, 40], [1]]
    found = continue_greedily(last_logits(whole), prompts, 12, {NONE}, alone)
    for prompt, continuation in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        expected = whole.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
        )  # type: ignore[operator]
        assert continuation == expected[0, len(prompt) :].tolist()
        assert len(continuation) == 12


def test_a_continuation_stops_with_the_end_and_others_go_on() -> None:
    calls = []

    def counting(ids: Tensor, last: Tensor) -> Tensor:
        """The token after n is n + 1."""
        calls.append(ids.shape)
        return torch.nn.functional.one_hot(ids[torch.arange(len(ids)), last] + 1, 20)

    assert continue_greedily(counting, [[3], [8], [2, 6]], 4, {5, 19}, alone) == [
        [4, 5], [9, 10, 11, 12], [7, 8, 9, 10],
    ]  # fmt: skip
    assert len(calls) == 4
    assert continue_greedily(counting, [[3], [1, 4]], 9, {5}, alone) == [[4, 5], [5]]
    assert len(calls) == 6  # no longer than the longest needs
    assert continue_greedily(counting, [], 9, {5}, alone) == []


def test_the_first_process_decides() -> None:
    def other(chosen: Tensor) -> Tensor:
        return torch.full_like(chosen, 7)

    def logits(ids: Tensor, last: Tensor) -> Tensor:
        return torch.zeros(len(ids), 20)

    assert continue_greedily(logits, [[3], [8]], 2, {5}, other) == [[7, 7], [7, 7]]


def on_a_shard(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    dist.init_process_group("gloo")
    model = load(path)
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer)
    fully_shard(model)
    found = continue_greedily(last_logits(model), prompts, 6, {NONE}, as_on_rank_0)
    dist.destroy_process_group()
    return found


def test_a_sharded_model_continues_alike_on_all_processes(model: Path) -> None:
    prompts = [[1, 5, 9], [1, 7]]
    expected = continue_greedily(last_logits(load(model)), prompts, 6, {NONE}, alone)
    assert run_ranks(on_a_shard, 2, model, prompts) == [expected, expected]


def test_prompts_begin_the_first_long_documents_of_each_language(store: Path) -> None:
    opened = Store.open(store)
    prompts = prompts_from(opened, count=3, tokens=8)
    assert [prompt.language for prompt in prompts] == ["ko"] * 3 + ["en"] * 3
    for source in opened.info.sources:
        documents = opened.documents(source, "heldout")
        pieces = [
            documents.tokens[a:b].tolist()
            for a, b in zip(documents.starts, documents.starts[1:], strict=False)
        ]
        expected = [ids[:8] for ids in pieces if len(ids) > 9][:3]
        assert [prompt.ids for prompt in prompts if prompt.language == source.language] == expected


def test_documents_that_are_missing_are_told(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prompts_from(Store.open(store), count=2, tokens=100_000) == []
    assert (
        "ko: 0 of 2 held-out documents to continue are longer than 100000 tokens"
        in capsys.readouterr().err
    )


def test_rows_are_for_reading(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt, continuation = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("나는", " 너를")
    )
    (row,) = continuation_rows(7, [Prompt("ko", prompt)], [continuation], tokenizer.decode)
    assert dict(zip(COLUMNS, row, strict=True)) == {
        "step": 7,
        "language": "ko",
        "prompt": "나는",
        "continuation": " 너를",
    }
