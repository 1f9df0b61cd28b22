"""Mixtures of experts in the training stage: equal to transformers, on any backend, in the base's files."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from cpt_merge.checkpoint.export import LocalShard
from cpt_merge.data.packing import TrainingSequences
from cpt_merge.data.store import Store
from cpt_merge.merge import MergeConfig
from cpt_merge.merge.files import merge_directories
from cpt_merge.merge.hook import merge_shards
from cpt_merge.merge.plan import MergeInputs
from cpt_merge.tracking import Tracker
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.inputs import TrainingInputs
from cpt_merge.training.run import run
from cpt_merge.training.saved import choose_steps, export_checkpoints
from cpt_merge.training.schedule import RateCurve
from tests.distributed import run_ranks
from tests.recording import Recording
from tests.training.callbacks.test_preview import replies_of, rows_of
from tests.training.conftest import CONFIG
from tests.training.runs import (
    Job,
    ask_for,
    assert_same_weights,
    previewed_by,
    train_rows,
    train_steps,
    weights,
)

COEFFICIENT = 1.0


@pytest.fixture(scope="module")
def expert_model(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Five experts, which two processes cannot share evenly; its files hold them one by one."""
    folder = tmp_path_factory.mktemp("experts") / "model"
    shutil.copytree(model, folder)
    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        vocab_size=301, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, bos_token_id=0, eos_token_id=1,
        num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16, router_aux_loss_coef=COEFFICIENT,
        mlp_only_layers=[0], initializer_range=0.1,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    assert "model.layers.1.mlp.experts.4.up_proj.weight" in load_file(folder / "model.safetensors")
    return folder


@dataclass(frozen=True)
class PlainRun:
    """The same run in plain transformers."""

    steps: dict[int, tuple[float, float]]  # loss and gradient norm
    weights: dict[str, torch.Tensor]  # as transformers saves the trained model


def dealt_out(step: int, size: int) -> list[list[int]]:
    """The sequences of each micro-batch of a step: of two, and dealt out to the processes in turn."""
    rows = range(step * 8, step * 8 + 8)
    return [
        list(rows[rank::size][at : at + 2]) for rank in range(size) for at in range(0, 8 // size, 2)
    ]


@pytest.fixture(scope="module")
def plain_run(
    expert_model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., PlainRun]:
    """`plain_run(coefficient, size)`: with the mean of the micro-batches' auxiliary losses."""
    config = TrainingConfig(**CONFIG)

    @cache
    def made(coefficient: float, size: int) -> PlainRun:
        model = AutoModelForCausalLM.from_pretrained(expert_model, dtype=torch.float32)
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            betas=(0.9, 0.95), eps=1e-4,
        )  # fmt: skip
        steps: dict[int, tuple[float, float]] = {}
        sequences = TrainingSequences(Store.open(store), config.sequence_length, config.seed)
        for step in range(config.steps):
            batches = [sequences.batch(rows) for rows in dealt_out(step, size)]
            targets = sum(int((batch.labels != -100).sum()) for batch in batches)
            total = 0.0
            for batch in batches:
                output = model(
                    input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False,
                    output_router_logits=True,
                )  # fmt: skip
                logits, labels = output.logits.flatten(0, 1), batch.labels.flatten()
                loss = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / targets
                total += loss.item()
                (loss + coefficient * output.aux_loss / len(batches)).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * RateCurve.over(0, config.steps, config.schedule).factor(
                    step, config.schedule
                )
            optimizer.step()
            optimizer.zero_grad()
            steps[step + 1] = (total, norm.item())
        folder = tmp_path_factory.mktemp("plain")
        model.save_pretrained(folder)
        return PlainRun(steps, load_file(folder / "model.safetensors"))

    return made


@pytest.fixture(scope="module")
def finished_run(
    expert_model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, dict[int, tuple[float, float]]]]:
    @cache
    def made(
        backend: str, size: int, stop_after: int = 0
    ) -> tuple[Path, dict[int, tuple[float, float]]]:
        out = tmp_path_factory.mktemp("run") / "out"
        job = Job(expert_model, store, out, backend=backend, stop_after=stop_after)
        return out, run_ranks(train_steps, size, job)[0]

    return made


BACKENDS = [
    ("fsdp2", 1), ("fsdp2", 2), pytest.param("zero3", 2, marks=pytest.mark.slow),
    pytest.param("zero2", 2, marks=pytest.mark.slow), pytest.param("hsdp", 4, marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("backend", "size"), BACKENDS)
def test_steps_equal_those_of_transformers_with_the_auxiliary_loss(
    backend: str, size: int, finished_run: Any, plain_run: Callable[..., PlainRun]
) -> None:
    """Gradient norms too: the loss that is reported does not contain the auxiliary loss."""
    _, steps = finished_run(backend, size)
    expected = plain_run(COEFFICIENT, size).steps
    assert list(steps) == list(expected)
    for step, (loss, norm) in steps.items():
        assert loss == pytest.approx(expected[step][0], rel=2e-5), step
        assert norm == pytest.approx(expected[step][1], rel=2e-4), step


@pytest.mark.parametrize(("backend", "size"), BACKENDS)
def test_the_export_has_the_names_shapes_and_types_of_the_base(
    backend: str,
    size: int,
    expert_model: Path,
    finished_run: Any,
    plain_run: Callable[..., PlainRun],
    tmp_path: Path,
) -> None:
    out, _ = finished_run(backend, size)
    base, found = load_file(expert_model / "model.safetensors"), weights(out)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in base.items()
    }
    for name, tensor in plain_run(COEFFICIENT, size).weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
        assert not torch.equal(found[name], base[name]), name
    newest = choose_steps(out / "checkpoints", None, None)
    export_checkpoints(
        TrainingConfig(**CONFIG), expert_model, expert_model, newest, tmp_path / "again"
    )
    for name, tensor in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(tensor, found[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "size"), [("fsdp2", 2)])
def test_resume_is_bit_for_bit_the_same(
    backend: str, size: int, expert_model: Path, store: Path, finished_run: Any, tmp_path: Path
) -> None:
    (whole, steps), (stopped, first) = finished_run(backend, size), finished_run(backend, size, 5)
    shutil.copytree(stopped, tmp_path / "parts")
    job = Job(expert_model, store, tmp_path / "parts", backend=backend)
    second = run_ranks(train_steps, size, job)[0]
    assert {**first, **second} == steps
    assert_same_weights(whole, tmp_path / "parts")


def test_the_auxiliary_loss_can_be_switched_off_and_spreads_the_tokens(
    expert_model: Path, store: Path, plain_run: Callable[..., PlainRun], tmp_path: Path
) -> None:
    """Without it the run is that of transformers without it; with it the experts are used more evenly."""
    off = Job(expert_model, store, tmp_path / "off", {"auxiliary_loss": False})
    without, with_it = (
        run_ranks(train_rows, 1, job)[0] for job in (off, Job(expert_model, store, tmp_path / "on"))
    )
    for step, (loss, norm) in plain_run(0.0, 1).steps.items():
        assert without[step]["train/loss"] == pytest.approx(loss, rel=2e-5), step
        assert without[step]["train/gradient_norm"] == pytest.approx(norm, rel=2e-4), step
    first, last = with_it[1], with_it[12]
    assert 1 / 5 <= last["train/busiest_expert"] < without[12]["train/busiest_expert"]
    assert first["train/busiest_expert"] == pytest.approx(without[1]["train/busiest_expert"])
    assert 2 <= last["train/router_loss"] < first["train/router_loss"]
    assert 0 < last["train/router_entropy"] <= 1
    assert "train/router_loss" not in without[12]


@pytest.fixture(scope="module")
def chat_together(expert_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sibling whose files hold the experts of a layer together."""
    folder = tmp_path_factory.mktemp("chat") / "chat"
    shutil.copytree(expert_model, folder)
    chat = AutoModelForCausalLM.from_pretrained(expert_model, dtype=torch.float32)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in chat.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    chat.save_pretrained(folder, save_original_format=False)
    assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(folder / "model.safetensors")
    return folder


def train_and_merge(job: Job, chat: Path) -> dict[int, float]:
    """Train with previews, and merge the shards at the end."""
    ask_for(job.backend)
    recording = Recording()
    models = MergeInputs(job.model, job.model, chat, job.model)

    def hook(shards: list[LocalShard], parallel: Parallel) -> None:
        merge_shards(shards, MergeConfig(), models, job.out / "merged", Tracker(), parallel)

    inputs = TrainingInputs(job.model, job.model, job.store, "key")
    tracker = Tracker([recording], {"mode": "disabled", "run_id": "id", "group": "group"})
    run(job.config, inputs, job.out, tracker, hook, previewed_by(job))
    return {step: row["train/loss"] for step, row in recording.rows if step and "train/loss" in row}


@pytest.mark.parametrize(
    ("backend", "size"),
    [("fsdp2", 2), pytest.param("zero3", 2, marks=pytest.mark.slow), pytest.param("fsdp2", 1, marks=pytest.mark.slow)],
)  # fmt: skip
def test_hook_and_preview_add_the_vector_of_a_chat_model_in_the_other_layout(
    backend: str,
    size: int,
    expert_model: Path,
    chat_together: Path,
    store: Path,
    finished_run: Any,
    tmp_path: Path,
) -> None:
    changes = {"preview": {"every": 6, "max_new_tokens": 6}}
    job = Job(expert_model, store, tmp_path / "out", changes, backend, chat=chat_together)
    losses = run_ranks(train_and_merge, size, job, chat_together)[0]
    whole, steps = finished_run(backend, size)
    assert losses == {step: loss for step, (loss, _) in steps.items()}, "previews change nothing"
    assert_same_weights(whole, job.out)
    cpt = job.out / "cpt"
    merge_directories(
        MergeConfig(),
        MergeInputs(cpt, expert_model, chat_together, cpt),
        tmp_path / "files",
        Tracker(),
    )
    found = load_file(job.out / "merged" / "model.safetensors")
    for name, values in load_file(tmp_path / "files" / "model.safetensors").items():
        assert torch.equal(found[name], values), name
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "files").state_dict()
    assert rows_of(job.out)[12] == replies_of(state, expert_model)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp2", "zero2", "zero3"])
def test_bf16_with_recomputation_trains_alike_on_two_processes(
    backend: str, expert_model: Path, store: Path, tmp_path: Path
) -> None:
    """Recomputation does not hear the routers a second time, and bf16 experts are multiplied in groups."""
    changes = {"precision": "bf16"}
    plain = Job(expert_model, store, tmp_path / "plain", changes, backend)
    again = Job(
        expert_model, store, tmp_path / "again", {**changes, "activation_checkpointing": "full"}, backend
    )  # fmt: skip
    expected, found = (run_ranks(train_rows, 2, job)[0] for job in (plain, again))
    for step, row in expected.items():
        for name in (
            "train/loss",
            "train/gradient_norm",
            "train/router_loss",
            "train/busiest_expert",
        ):
            assert found[step][name] == pytest.approx(row[name], rel=2e-2), (step, name)
    assert_same_names(tmp_path / "again" / "cpt", expert_model)


def assert_same_names(out: Path, base: Path) -> None:
    found, expected = (load_file(folder / "model.safetensors") for folder in (out, base))
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
        n: (t.shape, t.dtype) for n, t in expected.items()
    }
