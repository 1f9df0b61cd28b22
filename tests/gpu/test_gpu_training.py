"""The training stage on one GPU with every backend: learns as on a CPU, resumes, exports."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from cpt_merge.data.packing import TrainingSequences
from cpt_merge.data.store import Store
from cpt_merge.launcher.accelerate_file import backend_environment
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.build import build_backend
from cpt_merge.training.distributed.parallel import start_parallel
from cpt_merge.training.memory import MemorySetup, ModelShape, estimate_memory
from cpt_merge.training.phases import PhaseSetup, phases_of
from tests.distributed import run_ranks
from tests.training.conftest import CONFIG
from tests.training.families import documents, make_family
from tests.training.runs import ROOT, Job, reference_steps, train_steps, weights

needs_deepspeed = pytest.mark.skipif(
    not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed"
)
BACKENDS = [
    "alone",
    "fsdp2",
    "fsdp2-offload",
    *(pytest.param(f"zero{stage}", marks=needs_deepspeed) for stage in (1, 2, 3)),
]


def train_by(backend: str, job: Job) -> dict[int, tuple[float, float]]:
    """In a group of one process, which `run_ranks` makes."""
    if backend == "fsdp2":  # a Job's own "fsdp2" is not sharded on one process
        os.environ.update(backend_environment(ROOT / "recipes" / "accelerate" / "fsdp2.yaml"))
    return train_steps(job)


def job_of(
    backend: str, model: Path, store: Path, out: Path, changes: dict[str, Any], stop_after: int = 0
) -> Job:
    return Job(model, store, out, changes, "fsdp2" if backend == "alone" else backend, stop_after)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"compile": True, "activation_checkpointing": "selective"},
        {"compile": True, "activation_checkpointing": "full", "offload_activations": True},
    ],
    ids=["", "compiled", "activations offloaded"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_learns_as_float32_on_a_cpu(
    backend: str, changes: dict[str, Any], model: Path, store: Path, tmp_path: Path
) -> None:
    job = job_of(backend, model, store, tmp_path, {"precision": "bf16", **changes})
    steps = run_ranks(train_by, 1, backend, job, timeout=400)[0]
    expected = reference_steps(model, store)
    assert list(steps) == list(expected)
    for step, (loss, norm) in steps.items():
        assert loss == pytest.approx(expected[step][0], rel=0.02), step
        assert norm == pytest.approx(expected[step][1], rel=0.1), step
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_the_reference(backend: str, model: Path, store: Path, tmp_path: Path) -> None:
    job = job_of(backend, model, store, tmp_path, {"attention": "sdpa"})
    steps = run_ranks(train_by, 1, backend, job, timeout=400)[0]
    for step, (loss, _) in reference_steps(model, store).items():
        assert steps[step][0] == pytest.approx(loss, rel=1e-3), step


@pytest.mark.parametrize("backend", BACKENDS)
def test_stopped_and_resumed_it_is_bit_for_bit_the_same(
    backend: str, model: Path, store: Path, tmp_path: Path
) -> None:
    """With sdpa: the backward pass of flash adds in any order."""
    changes = {"precision": "bf16", "attention": "sdpa"}
    whole = run_ranks(
        train_by,
        1,
        backend,
        job_of(backend, model, store, tmp_path / "whole", changes),
        timeout=400,
    )[0]
    parts = tmp_path / "parts"
    first = run_ranks(
        train_by, 1, backend, job_of(backend, model, store, parts, changes, 5), timeout=400
    )[0]
    second = run_ranks(
        train_by, 1, backend, job_of(backend, model, store, parts, changes), timeout=400
    )[0]
    assert min(second) == max(first) + 1
    assert {**first, **second} == whole
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(parts)[name]), name


def placed(name: str, model: Path) -> tuple[set[str], float]:
    """Devices of masters and moments after a step, and the GB that the GPU holds then."""
    os.environ.update(backend_environment(ROOT / "recipes" / "accelerate" / f"{name}.yaml"))
    config, parallel = TrainingConfig(**CONFIG | {"precision": "bf16"}), start_parallel()
    backend: Any = build_backend(PhaseSetup(config, phases_of(config)[0], model, 0), parallel)
    backend.backward(documents(2).to(parallel.device), 1e-2, last=True)
    assert backend.step(1.0).finite
    states = [value for state in backend.optimizer.state.values() for value in state.values()]
    devices = {tensor.device.type for tensor in [*backend.module.parameters(), *states]}
    return devices, torch.cuda.memory_allocated() / 1e9


def test_fsdp2_keeps_weights_and_moments_in_the_cpus_memory(tmp_path: Path) -> None:
    """10.6 M parameters and their moments are 0.127 GB."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    make_family(tmp_path, "llama", tied=False, **shape)
    here, less = run_ranks(placed, 1, "fsdp2-offload", tmp_path, timeout=200)[0]
    there, more = run_ranks(placed, 1, "fsdp2", tmp_path, timeout=200)[0]
    assert (here, there) == ({"cpu"}, {"cuda"})
    assert less < more - 0.1


def losses_and_peak(model: Path, changes: dict[str, Any]) -> tuple[list[float], list[float], float]:
    """Losses and norms of three steps, and the GB that the GPU held at most in the last one."""
    config = TrainingConfig(**CONFIG | {"precision": "bf16", "attention": "sdpa"} | changes)
    parallel = start_parallel()
    backend = build_backend(PhaseSetup(config, phases_of(config)[0], model, 0), parallel)
    losses, norms = [], []
    for seed in range(3):
        torch.cuda.reset_peak_memory_stats()
        batch = documents(4, (512, 512, 512, 512), seed=seed).to(parallel.device)
        losses.append(backend.backward(batch, 1e-4, last=True).item())
        norms.append(backend.step(1.0).gradient_norm.item())
    return losses, norms, torch.cuda.max_memory_allocated() / 1e9


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_offloaded_activations_change_no_bit_and_leave_the_gpu(
    recompute: str, tmp_path: Path
) -> None:
    """16 layers keep 0.13 GB with full activation checkpointing, and far more without."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 16}
    make_family(tmp_path, "llama", tied=False, max_position_embeddings=512, **shape)
    *kept, more = run_ranks(
        losses_and_peak, 1, tmp_path, {"activation_checkpointing": recompute}, timeout=200
    )[0]
    changes = {"activation_checkpointing": recompute, "offload_activations": True}
    *moved, less = run_ranks(losses_and_peak, 1, tmp_path, changes, timeout=200)[0]
    assert moved == kept
    assert less < more - 0.05


def peak_and_estimate(model: Path, store: Path, changes: dict[str, Any]) -> tuple[float, float]:
    """GB at most in three steps, and what `training.memory` says."""
    config, parallel = TrainingConfig(**changes), start_parallel()
    backend = build_backend(PhaseSetup(config, phases_of(config)[0], model, 0), parallel)
    rows = TrainingSequences(Store.open(store), config.sequence_length, 0)
    for step in range(3):
        for micro in range(2):
            batch = rows.batch([2 * step + micro] * config.micro_batch_size).to(parallel.device)
            backend.backward(batch, 1e-3, last=micro == 1)
        backend.step(1.0)
    peak = torch.cuda.max_memory_allocated()
    parameters = sum(parameter.numel() for parameter in backend.module.parameters())  # type: ignore[attr-defined]
    shape = ModelShape.from_config(backend.module.model.config.to_dict(), parameters, "it")  # type: ignore[attr-defined]
    return peak / 1e9, estimate_memory(
        shape, MemorySetup.of(config, backend.strategy, 1, 1)
    ).total / 1e9


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("attention", ["flash", "sdpa"])
def test_the_memory_estimate_is_within_a_tenth(
    attention: str, recompute: str, compiled: bool, tmp_path: Path
) -> None:
    from benchmarks.training_inputs import SIZES, Inputs, Size, prepare

    SIZES["memory"] = Size(32_000, 1024, 2816, 8, 16, 8)
    prepare(tmp_path, "memory", 200_000)
    inputs = Inputs.of(tmp_path, "memory")
    changes = {
        "sequence_length": 2048, "global_batch_size": 8, "micro_batch_size": 4, "tokens": 10**6, "attention": attention,
        "activation_checkpointing": recompute, "compile": compiled,
    }  # fmt: skip
    peak, estimate = run_ranks(
        peak_and_estimate, 1, inputs.model, inputs.store, changes, timeout=300
    )[0]
    assert estimate == pytest.approx(peak, rel=0.1)
