"""The preview changes nothing in training, and shows the chat model that the hook would make."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cpt_merge.core.artifact import read_json_lines
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.files import merge_directories as merge
from cpt_merge.merge.plan import MergeInputs
from cpt_merge.tracking import Tracker
from cpt_merge.training.distributed.backend import replaced
from tests.distributed import run_ranks
from tests.training.runs import PROMPTS, Job, assert_same_weights, train, train_steps, weights

EVERY = {"preview": {"every": 5, "max_new_tokens": 6}}
SLOW = [
    ("bf16", "fsdp2", 1), ("pure-bf16", "fsdp2", 1), ("fp32", "fsdp2", 2), ("bf16", "fsdp2", 2), ("fp32", "hsdp", 4),
    ("fp32", "zero1", 2), ("bf16", "zero2", 2), ("fp32", "zero3", 2), ("bf16", "zero3", 2),
]  # fmt: skip


def rows_of(out: Path) -> dict[int, list[list[int]]]:
    """step -> the replies that were shown, in ids."""
    found: dict[int, list[list[int]]] = {}
    for line in (out / "preview.jsonl").read_text().splitlines():
        step, reply = json.loads(line)
        found.setdefault(step, []).append([int(number) for number in reply.split()])
    return found


def replies_of(state: dict[str, torch.Tensor], like: Path) -> list[list[int]]:
    """What transformers' own `generate` answers with these weights."""
    model = AutoModelForCausalLM.from_pretrained(like, dtype=torch.float32).eval()
    model.load_state_dict(state)
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        row = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=1,
        )
        found.append(row[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize(
    ("precision", "backend", "size"),
    [("fp32", "fsdp2", 1), *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)],
)
@pytest.mark.parametrize("lora", [False, True])
def test_training_is_the_same_with_and_without(
    precision: str,
    backend: str,
    size: int,
    lora: bool,
    model: Path,
    chat_model: Path,
    store: Path,
    tmp_path: Path,
) -> None:
    changes: dict[str, Any] = {"precision": precision}
    if lora:
        changes["lora"] = {"rank": 5}
    more = {**changes, **EVERY, "continuations": 1}
    plain = Job(model, store, tmp_path / "plain", changes, backend)
    shown = Job(model, store, tmp_path / "shown", more, backend, chat=chat_model)
    without, with_it = run_ranks(train_steps, size, plain), run_ranks(train_steps, size, shown)
    assert with_it == without
    assert_same_weights(plain.out, shown.out)
    assert list(rows_of(shown.out)) == [0, 5, 10, 12]
    continued = read_json_lines(shown.out / "continuations.jsonl")
    assert [row[:2] for row in continued] == [
        [n, name] for n in (0, 6, 12) for name in ("ko", "en")
    ]
    if precision == "fp32":
        base, chat = (
            AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (model, chat_model)
        )
        merged = {
            name: values + (chat[name] - base[name]) for name, values in weights(shown.out).items()
        }
        assert rows_of(shown.out)[12] == replies_of(merged, model)
        assert rows_of(shown.out)[0] == replies_of(
            {n: base[n] + (chat[n] - base[n]) for n in base}, model
        )
        assert rows_of(shown.out)[0] != rows_of(shown.out)[12]


@pytest.mark.slow
def test_a_resumed_run_shows_each_step_once(
    model: Path, chat_model: Path, store: Path, tmp_path: Path
) -> None:
    whole = Job(model, store, tmp_path / "whole", EVERY, chat=chat_model)
    run_ranks(train, 1, whole)
    cut = Job(model, store, tmp_path / "cut", EVERY, chat=chat_model, stop_after=6)
    run_ranks(train, 1, cut)
    assert list(rows_of(cut.out)) == [0, 5]
    run_ranks(train, 1, Job(model, store, cut.out, EVERY, chat=chat_model))
    assert rows_of(cut.out) == rows_of(whole.out)
    assert_same_weights(whole.out, cut.out)


def test_what_fails_on_the_way_is_undone() -> None:
    first, second = torch.randn(5, 3), torch.randn(4)
    first[0, 0], first[0, 1] = float("nan"), -0.0
    before = first.clone().view(torch.int32), second.clone().view(torch.int32)

    def replacements():
        yield first, torch.ones(5, 3)
        yield second[1:3], torch.zeros(2)
        raise ValueError("the third")

    with pytest.raises(ValueError, match="the third"), replaced(replacements()):
        raise AssertionError("never begun")
    assert torch.equal(first.view(torch.int32), before[0])
    assert torch.equal(second.view(torch.int32), before[1])


@pytest.mark.slow
def test_with_ties_and_a_gate_the_reply_is_the_hooks(
    model: Path, chat_model: Path, store: Path, tmp_path: Path
) -> None:
    settings = {"method": "ties", "density": 0.5, "gate": True}
    job = Job(model, store, tmp_path / "run", EVERY, chat=chat_model, merge=settings)
    run_ranks(train, 1, job)
    inputs = MergeInputs(job.out / "cpt", model, chat_model, model)
    merge(MergeConfig.model_validate(settings), inputs, tmp_path / "chat", Tracker())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "chat").state_dict()
    assert rows_of(job.out)[12] == replies_of(merged, model)
