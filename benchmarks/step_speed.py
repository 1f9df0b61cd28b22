"""Speed and memory of training steps on one process, and where a GPU's time goes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from benchmarks.training_contenders import ROOT, TrainingCase, settings
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.data.packing import TrainingSequences
from cpt_merge.data.store import Store
from cpt_merge.launcher.accelerate_file import backend_environment
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.backend import Backend
from cpt_merge.training.distributed.build import build_backend
from cpt_merge.training.distributed.parallel import Parallel, start_parallel
from cpt_merge.training.flops import flops_per_token, peak_flops
from cpt_merge.training.memory import MemorySetup, ModelShape, estimate_memory
from cpt_merge.training.model.build import read_model_config
from cpt_merge.training.phases import PhaseSetup, phases_of

WARM_UP = 4  # steps, in which layers are compiled
# What a kernel computes, by a part of its name
KERNELS = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "matmul": ("gemm", "cutlass", "nvjet", "cublas", "grouped_mm", "matmul"),
    "optimizer": ("adam",),
    "copies": ("memcpy", "memset"),
}


@dataclass(frozen=True)
class StepSpeed:
    """Of a process: medians over steps."""

    device: str
    seconds: float  # of a step
    tokens_per_second: float
    mfu: float | None  # None on a CPU
    peak_gb: float | None
    estimated_gb: float
    time_by_kind: dict[str, float]  # share of the GPU's busy time
    kernels: list[tuple[str, float]]  # the largest, with their shares
    idle: float | None  # share of the profiled steps in which no kernel ran


class Steps:
    """A backend that trains step after step on a case's sequences."""

    def __init__(
        self,
        case: TrainingCase,
        changes: dict[str, Any],
        fsdp: bool = False,
        parallel: Parallel | None = None,
    ) -> None:
        if fsdp:
            os.environ.update(backend_environment(ROOT / "recipes" / "accelerate" / "fsdp2.yaml"))
        self.case, self.config = case, TrainingConfig(**_merged(settings(case), changes))
        self.parallel = parallel or start_parallel(offload=self.config.offload)
        setup = PhaseSetup(self.config, phases_of(self.config)[0], case.inputs.model, 0)
        self.backend: Backend = build_backend(setup, self.parallel)
        self.rows = TrainingSequences(Store.open(case.inputs.store), case.length, 0)

    def step(self, number: int) -> float:
        """Train step `number`; its loss per token."""
        case, size = self.case, self.case.global_batch_size
        loss = torch.zeros((), device=self.parallel.device)
        for start in range(number * size, (number + 1) * size, case.micro_batch_size):
            batch = self.rows.batch(list(range(start, start + case.micro_batch_size)))
            last = start + case.micro_batch_size >= (number + 1) * size
            scale = 1 / (size * case.length)
            loss += self.backend.backward(batch.to(self.parallel.device), scale, last)
        self.backend.step(1.0)
        return float(loss)  # waits for the device

    def timed(self, number: int) -> float:
        """Seconds of a step."""
        started = time.perf_counter()
        self.step(number)
        synchronise()
        return time.perf_counter() - started


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged, so that a changed optimizer keeps its learning rate."""
    found = {**values}
    for name, value in changes.items():
        old = found.get(name)
        found[name] = {**old, **value} if isinstance(old, dict) else value
    return found


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_steps(
    case: TrainingCase, steps: int, changes: dict[str, Any], fsdp: bool = False
) -> StepSpeed:
    """Train `steps` steps after some that warm up; with a GPU also a profile."""
    training = Steps(case, changes, fsdp)
    seconds = median([training.timed(number) for number in range(steps + WARM_UP)][WARM_UP:])
    rate = case.global_batch_size * case.length / seconds
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    kinds, kernels, idle = (
        _profile(lambda: [training.step(n) for n in range(2)]) if cuda else ({}, [], None)
    )
    device = torch.cuda.get_device_name() if cuda else "CPU"
    return StepSpeed(
        device, seconds, rate, _mfu(training, rate, device) if cuda else None, peak,
        _estimated(training), kinds, kernels, idle,
    )  # fmt: skip


def _mfu(training: Steps, rate: float, device: str) -> float:
    model = training.case.inputs.model
    parameters = ModelShape.of(Checkpoint.open(model), str(model)).active
    flops = flops_per_token(read_model_config(model), parameters, training.case.length)
    assert flops, f"the FLOPs of {model} are not known"
    return rate * flops / peak_flops(device)


def _estimated(training: Steps) -> float:
    """What `plan` says, in GB."""
    config, backend, model = training.config, training.backend, training.case.inputs.model
    shape = ModelShape.of(Checkpoint.open(model), str(model), config.lora)
    setup = MemorySetup.of(config, backend.strategy, 1, 1)
    setup = MemorySetup(
        **{
            **vars(setup),
            "attention": backend.choice.attention,
            "offload": config.offload or "none",
        }
    )
    return estimate_memory(shape, setup).total / 1e9


def _profile(
    run: Callable[[], Any], largest: int = 12
) -> tuple[dict[str, float], list[tuple[str, float]], float]:
    """(shares by kind, the largest kernels with theirs, share without a kernel)."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        run()
        elapsed = time.perf_counter() - started
    kernels = [event for event in found.key_averages() if event.device_type == DeviceType.CUDA]
    kernels = [event for event in kernels if not event.is_user_annotation]
    busy = sum(event.self_device_time_total for event in kernels)
    kernels.sort(key=lambda event: -event.self_device_time_total)
    kinds: dict[str, float] = {}
    for event in kernels:
        kind = kind_of_kernel(event.key)
        kinds[kind] = kinds.get(kind, 0.0) + event.self_device_time_total / busy
    shares = [(event.key[:90], event.self_device_time_total / busy) for event in kernels[:largest]]
    return kinds, shares, max(0.0, 1 - busy / 1e6 / elapsed)


def kind_of_kernel(name: str) -> str:
    """What a kernel computes; elementwise if its name says nothing else."""
    lower = name.lower()
    found = [kind for kind, parts in KERNELS.items() if any(part in lower for part in parts)]
    return found[0] if found else "elementwise"
