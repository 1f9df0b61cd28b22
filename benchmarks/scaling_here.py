"""The model of training speed on this machine.

It predicts FSDP2 on two processes from the speed of one process and the bandwidth of gloo.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.training import Processes, free_port
from benchmarks.training_contenders import TimedInterval, TrainingCase
from benchmarks.training_inputs import Inputs
from cpt_merge.cluster.plan import PARTS
from cpt_merge.cluster.scaling import (
    LINK_SHARE,
    MEMORY_SHARE,
    START_LATENCY,
    Cluster,
    GpuSpec,
    StepEstimate,
    Workload,
    estimate_step,
)
from cpt_merge.training.memory import ModelShape

LENGTH, MICRO_BATCHES = 512, 2
COPIED = 2**24
SMALL, LARGE = 2**14, 2**21  # numbers in a collective; latency and bandwidth follow from both


def predict(folder: Path, size: str, rounds: int) -> None:
    """Print the measured and the predicted step of FSDP2 on two processes.

    The prediction: computing as fast as two independent processes at a time, communicating as fast
    as gloo. Medians and fastest rounds are compared: on a machine that others use, the fastest are
    the least disturbed ones.
    """
    shape, work = _shape(Inputs.of(folder, size).model), Workload(LENGTH, 1, MICRO_BATCHES, "fp32")
    steps, (small, large), copies = _steps(folder, size, rounds), _links(), _copies()
    for name, pick in (("median", median), ("fastest", min)):
        seconds = {case: pick(values) for case, values in steps.items()}
        estimate, words = _estimate(
            shape, work, seconds["two at a time"], pick(small), pick(large), pick(copies)
        )
        error = estimate.seconds / seconds["FSDP2 on two"] - 1
        print(f"{size}, {name}: {words}")
        measured = ", ".join(f"{case} {1000 * value:.0f} ms" for case, value in seconds.items())
        print(f"  measured: {measured}")
        print(
            f"  FSDP2 on two, predicted: {1000 * estimate.seconds:.0f} ms, error {error:+.0%}: "
            + ", ".join(f"{part} {1000 * getattr(estimate, part):.0f}" for part in PARTS)
        )


def _estimate(
    shape: ModelShape, work: Workload, alone: float, small: float, large: float, copy: float
) -> tuple[StepEstimate, str]:
    """(prediction, its inputs in words), from seconds of a step, two collectives and a copy."""
    bandwidth = (LARGE - SMALL) * 4 / 2 / (large - small)
    latency = small - SMALL * 4 / 2 / bandwidth
    memory = 2 * 8 * COPIED / copy
    processor = GpuSpec(
        "cpu", 1e12, 1.0, 1.0, 0, memory / MEMORY_SHARE, bandwidth / LINK_SHARE, 1e9,
        interference=1.0, fp8=False, hop=max(0.0, latency - START_LATENCY),
    )  # fmt: skip
    processor = _as_fast(processor, shape, work, alone)
    words = (
        f"{processor.peak / 1e9:.1f} GFLOP/s a process, memory {memory / 1e9:.1f} GB/s; "
        f"gloo {bandwidth / 1e9:.2f} GB/s, {latency * 1e6:.0f} us"
    )
    return estimate_step(shape, work, Cluster(processor, 1, 2, 1.0)), words


def _as_fast(processor: GpuSpec, shape: ModelShape, work: Workload, seconds: float) -> GpuSpec:
    """The processor with the FLOP/s at which a step of one process takes so many seconds."""
    found = estimate_step(shape, work, Cluster(processor, 1, 1, 1.0))
    left = seconds - found.elementwise - found.optimizer
    return replace(processor, peak=processor.peak * (found.matmul + found.attention) / left)


def _shape(model: Path) -> ModelShape:
    config = json.loads((model / "config.json").read_text())
    shape = ModelShape.from_config(config, 0, str(model))
    layer = shape.width * (2 * shape.query + 2 * shape.key_value + 3 * shape.intermediate + 2)
    return replace(
        shape, parameters=shape.layers * layer + shape.vocabulary_parameters + shape.width
    )


def _steps(folder: Path, size: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step in each round; in a round, each case trains an interval, in turn."""

    def case(processes: int) -> TrainingCase:
        inputs, sequences = Inputs.of(folder, size), MICRO_BATCHES * processes
        return TrainingCase(inputs, "fp32", processes, LENGTH, sequences, 1, 2, rounds)

    pair, sharded = [Processes("bare", case(1)) for _ in range(2)], Processes("bare", case(2))
    alone = Processes("bare", case(1))
    found: dict[str, list[float]] = {"alone": [], "two at a time": [], "FSDP2 on two": []}
    for _ in range(rounds):
        found["alone"].append(_seconds(alone.interval(), 2))
        for contender in pair:
            contender.start()
        found["two at a time"].append(_seconds([contender.wait()[0] for contender in pair], 2))
        found["FSDP2 on two"].append(_seconds(sharded.interval(), 2))
    for contender in (*pair, sharded, alone):
        contender.end()
    return found


def _seconds(intervals: list[TimedInterval], steps: int) -> float:
    """Seconds of a step, without the time that the process waited for a CPU."""
    return max(each.wall - each.delay for each in intervals) / steps


def _copies() -> list[float]:
    """Seconds that one process takes to copy `COPIED` fp64 numbers."""
    source, target = np.ones(COPIED), np.empty(COPIED)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return times


def _links() -> tuple[list[float], list[float]]:
    """Seconds of a collective of two processes, with `SMALL` and with `LARGE` fp32 numbers."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    mine, theirs = context.Pipe()
    processes = [
        context.Process(target=_collectives, args=(rank, port, theirs)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    small, large = mine.recv()
    for process in processes:
        process.join()
    return small, large


def _collectives(rank: int, port: int, connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = []
    for count in (SMALL, LARGE):
        whole, part = torch.ones(count), torch.ones(count // 2)
        times = []
        for _ in range(15):
            start = time.perf_counter()
            dist.all_gather_single(whole, part)
            dist.reduce_scatter_single(part, whole)
            times.append((time.perf_counter() - start) / 2)
        found.append(times)
    if rank == 0:
        connection.send(found)
    dist.barrier()
    dist.destroy_process_group()
