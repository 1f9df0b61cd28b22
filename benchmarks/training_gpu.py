"""MFU on one GPU, and where the rest of the time goes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.training_contenders import TrainingCase, settings


@dataclass(frozen=True)
class GpuResult:
    """Of one GPU: medians over steps."""

    device: str
    seconds: float  # of a step
    tokens_per_second: float
    mfu: float
    peak_gb: float
    profile: list[tuple[str, float]]  # kernel, share of the GPU's busy time; the largest first
    idle: float  # share of the profiled steps in which no kernel ran


def measure_gpu(case: TrainingCase, steps: int, changes: dict[str, Any]) -> GpuResult:
    """Train `steps` steps after 5 that warm up. Raises `SystemExit` without a GPU."""
    import torch
    from transformers import AutoConfig

    from cpt_merge.checkpoint.reader import Checkpoint
    from cpt_merge.data.packing import TrainingSequences
    from cpt_merge.data.store import Store
    from cpt_merge.training.config import TrainingConfig
    from cpt_merge.training.distributed.build import build_backend
    from cpt_merge.training.distributed.parallel import start_parallel
    from cpt_merge.training.flops import flops_per_token, peak_flops
    from cpt_merge.training.phases import PhaseSetup, phases_of

    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: torch.cuda.is_available() is false")
    config, parallel = TrainingConfig(**{**settings(case), **changes}), start_parallel()
    backend = build_backend(
        PhaseSetup(config, phases_of(config)[0], case.inputs.model, 0), parallel
    )
    rows = TrainingSequences(Store.open(case.inputs.store), case.length, 0)

    def step(number: int) -> float:
        first, started = number * case.global_batch_size, time.perf_counter()
        for start in range(first, first + case.global_batch_size, case.micro_batch_size):
            batch = rows.batch(list(range(start, start + case.micro_batch_size))).to(
                parallel.device
            )
            backend.backward(
                batch,
                1 / (case.global_batch_size * case.length),
                start + case.micro_batch_size >= case.global_batch_size,
            )
        backend.step(1.0)
        torch.cuda.synchronize()
        return time.perf_counter() - started

    seconds = median([step(number) for number in range(steps + 5)][5:])
    rate = case.global_batch_size * case.length / seconds
    model, device = case.inputs.model, torch.cuda.get_device_name()
    peak = peak_flops(device)
    flops = flops_per_token(
        AutoConfig.from_pretrained(model), Checkpoint.open(model).parameters, case.length
    )
    assert peak, f"the peak of {device} is not known"
    assert flops, f"the FLOPs of {model} are not known"
    profile, idle = _profile(lambda: [step(number) for number in range(3)])
    return GpuResult(
        device, seconds, rate, rate * flops / peak,
        torch.cuda.max_memory_allocated() / 1e9, profile, idle,
    )  # fmt: skip


def _profile(run: Any, largest: int = 20) -> tuple[list[tuple[str, float]], float]:
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
    shares = [(event.key[:90], event.self_device_time_total / busy) for event in kernels[:largest]]
    return shares, max(0.0, 1 - busy / 1e6 / elapsed)
