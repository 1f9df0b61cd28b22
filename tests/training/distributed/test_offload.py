"""Training with offloading equals training without it; what is asked for is active."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cpt_merge.core.distributed import stop_process_group
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.build import build_backend
from cpt_merge.training.distributed.offload import use_cores
from cpt_merge.training.distributed.parallel import start_parallel
from cpt_merge.training.phases import PhaseSetup, phases_of
from cpt_merge.training.saved import export_checkpoints
from tests.distributed import run_ranks
from tests.training.conftest import CONFIG, FinishedRun
from tests.training.runs import Job, ask_for, assert_same_weights, train, train_steps, weights

THIRDS = {"global_batch_size": 6, "tokens": 32 * 6 * 12}  # rows of 32 and 301 are uneven on 3 ranks


def fsdp2_parts(model: Path, changes: dict[str, Any]) -> tuple[bool, str]:
    """Whether every unit has FSDP2's policy, and the line of the summary."""
    ask_for("fsdp2")
    config = TrainingConfig(**CONFIG | changes)
    parallel = start_parallel(offload=config.offload)
    backend: Any = build_backend(PhaseSetup(config, phases_of(config)[0], model, 0), parallel)
    state = backend.module._get_fsdp_state()
    parts = [part for one in state._state_ctx.all_states for part in one._fsdp_param_groups]
    offloaded = [parameter.offload_to_cpu for part in parts for parameter in part.fsdp_params]
    stop_process_group()
    assert len(set(offloaded)) == 1, "all units alike"
    return offloaded[0], backend.describe()["backend"]


@pytest.mark.slow
def test_the_recipe_alone_makes_fsdp2_offload(model: Path) -> None:
    active, line = run_ranks(fsdp2_parts, 2, model, {"offload": "all"})[0]
    assert active
    assert line == (
        "FSDP2: 2 shards, 2 processes; weights, gradients and optimizer in the CPU's memory, "
        "where everything is on a CPU machine"
    )
    assert run_ranks(fsdp2_parts, 2, model, {})[0] == (False, "FSDP2: 2 shards, 2 processes")


def test_fsdp2_trains_the_same_with_and_without(finished: Callable[..., FinishedRun]) -> None:
    """Bit for bit on a CPU."""
    plain, offloaded = finished("fsdp2", 2), finished("fsdp2-offload", 2)
    assert plain.steps == offloaded.steps
    assert_same_weights(plain.out, offloaded.out)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (1, {"precision": "bf16"}),
        (3, THIRDS),
        (3, THIRDS | {"precision": "pure-bf16"}),
        (2, {"activation_checkpointing": "full"}),
        (2, {"phases": [{"train": "vocabulary", "tokens": 6 * 32 * 8}, {"train": "all"}]}),
    ],
)
def test_so_it_does_at_any_size_and_precision(
    size: int, changes: dict[str, Any], model: Path, store: Path, tmp_path: Path
) -> None:
    plain = Job(model, store, tmp_path / "plain", changes)
    whole = run_ranks(train_in_group, size, plain)[0]
    offloaded = Job(model, store, tmp_path / "offloaded", changes, "fsdp2-offload")
    assert run_ranks(train_steps, size, offloaded)[0] == whole
    assert_same_weights(plain.out, offloaded.out)


def train_in_group(job: Job) -> dict[int, tuple[float, float]]:
    """FSDP2 also on one process, where it is not the default."""
    os.environ["ACCELERATE_USE_FSDP"], os.environ["FSDP_VERSION"] = "true", "2"
    return train_steps(job)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("fsdp2-offload", 2), ("fsdp2-offload", 2)),
        (("fsdp2-offload", 2), ("fsdp2", 2)),
        (("fsdp2", 2), ("fsdp2-offload", 2)),
    ],
)
def test_a_checkpoint_continues_with_and_without(
    before: tuple[str, int],
    after: tuple[str, int],
    model: Path,
    store: Path,
    finished: Callable[..., FinishedRun],
    tmp_path: Path,
) -> None:
    whole, stopped = finished("fsdp2", 2), finished(*before, stop_after=5)
    parts = stopped.copied_to(tmp_path / "parts")
    second = run_ranks(train, after[1], Job(model, store, parts, backend=after[0]))[0]
    assert {**stopped.losses, **second} == whole.losses
    assert_same_weights(whole.out, parts)


@pytest.mark.slow
def test_previews_see_the_same_model(
    model: Path, chat_model: Path, store: Path, tmp_path: Path
) -> None:
    changes = {"preview": {"every": 6, "max_new_tokens": 8}}
    for backend in ("fsdp2", "fsdp2-offload"):
        job = Job(model, store, tmp_path / backend, changes, backend, chat=chat_model)
        run_ranks(train, 2, job)
    replies = [
        (tmp_path / backend / "preview.jsonl").read_text() for backend in ("fsdp2", "fsdp2-offload")
    ]
    assert replies[0] == replies[1]
    assert_same_weights(tmp_path / "fsdp2", tmp_path / "fsdp2-offload")


ZERO = [
    ("zero1", "optimizer", "fp32"), ("zero2", "optimizer", "fp32"), ("zero3", "optimizer", "fp32"),
    ("zero3", "all", "fp32"), ("zero2", "optimizer", "bf16"), ("zero3", "all", "bf16"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "offload", "precision"), ZERO)
def test_deepspeed_trains_the_same_and_resumes_exactly(
    backend: str, offload: str, precision: str, model: Path, store: Path, tmp_path: Path
) -> None:
    """Norms are added up in another order, which bf16 makes visible."""
    plain = Job(model, store, tmp_path / "plain", {"precision": precision}, backend)
    expected = run_ranks(train_steps, 2, plain)[0]
    changes = {"precision": precision, "offload": offload}
    whole = Job(model, store, tmp_path / "whole", changes, backend)
    steps = run_ranks(train_steps, 2, whole)[0]
    tolerance = 1e-6 if precision == "fp32" else 5e-4
    for step, (loss, norm) in steps.items():
        assert loss == pytest.approx(expected[step][0], rel=tolerance), step
        assert norm == pytest.approx(expected[step][1], rel=4 * tolerance), step
    parts = Job(model, store, tmp_path / "parts", changes, backend, stop_after=5)
    first = run_ranks(train_steps, 2, parts)[0]
    parts.stop_after = 0
    assert {**first, **run_ranks(train_steps, 2, parts)[0]} == steps
    assert_same_weights(whole.out, parts.out)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "offload"), [("zero2", "optimizer"), ("zero3", "all")])
def test_deepspeed_skips_previews_and_exports_the_same(
    backend: str,
    offload: str,
    model: Path,
    chat_model: Path,
    store: Path,
    tmp_path: Path,
) -> None:
    """A step that is not finite, previews, and a model from the files of the last checkpoint."""
    changes = {"preview": {"every": 6, "max_new_tokens": 8}}
    jobs = [
        Job(model, store, tmp_path / name, changes | {"offload": name}, backend,
            poison=range(5, 6), chat=chat_model)
        for name in ("none", offload)
    ]  # fmt: skip
    losses = [run_ranks(train, 2, job)[0] for job in jobs]
    for step, loss in losses[0].items():
        assert losses[1][step] == pytest.approx(loss, rel=1e-6, nan_ok=True), step
    assert [step for step, loss in losses[1].items() if loss != loss] == [6]
    previews = [(job.out / "preview.jsonl").read_text() for job in jobs]
    assert previews[0] == previews[1]
    newest = max((jobs[1].out / "checkpoints").glob("step-*"))
    export_checkpoints(jobs[1].config, model, model, [newest], tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    for name, tensor in weights(jobs[1].out).items():
        assert torch.equal(tensor, exported[name]), name


def cores(environment: dict[str, str]) -> int:
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    use_cores(environment)
    return torch.get_num_threads()


def test_the_step_uses_the_processs_share_of_the_cores() -> None:
    mine = len(os.sched_getaffinity(0))
    assert run_ranks(cores, 1, {})[0] == mine
    assert run_ranks(cores, 1, {"LOCAL_WORLD_SIZE": str(2 * mine)})[0] == 1
    assert run_ranks(cores, 1, {"SLURM_CPUS_PER_TASK": "3"})[0] == 3
    assert run_ranks(cores, 1, {"OMP_NUM_THREADS": "2"})[0] == 2
