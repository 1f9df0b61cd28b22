"""Rates, waits and stalls of two processes, of which one is slower."""

from types import SimpleNamespace

import pytest

from cpt_merge.core.distributed import stop_process_group
from cpt_merge.training import callbacks
from cpt_merge.training.callbacks.throughput import Throughput
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.distributed.parallel import start_parallel
from cpt_merge.training.flops import mfu
from tests.distributed import run_ranks
from tests.training.runs import ask_for

CONFIG = TrainingConfig(
    tokens=10**6, sequence_length=100, global_batch_size=4
)  # 400 tokens per step


class Clock:
    """A clock that only the test moves."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def an_interval() -> list[dict[str, float]]:
    """Five steps of 40 ms on rank 0 and 120 ms on rank 1, half of it for data; then nothing."""
    ask_for("fsdp2")
    parallel, clock = start_parallel(), Clock()
    callbacks.throughput.time = clock  # type: ignore[assignment]  # in this process only
    slow = 1 + 2 * parallel.rank
    metrics = Throughput()
    metrics.trainer = SimpleNamespace(config=CONFIG, parallel=parallel)  # type: ignore[assignment]
    metrics.flops, metrics.peak = {100: 1e6, 400: 4e6}, 1e9
    with metrics.phase():
        for _ in range(5):
            clock.now += 0.04 * slow
            metrics.spent("data", 0.02 * slow)
            metrics.after_step()
        for what, seconds in (("evaluation", 0.3), ("checkpoint", 0.1 * slow)):
            clock.now += seconds
            metrics.spent(what, seconds)
        first = metrics.metrics()
        clock.now += 1
        found = [first, metrics.metrics()]
    stop_process_group()
    return found


def test_an_interval_is_told_alike_by_all_processes_and_forgotten() -> None:
    here, there = run_ranks(an_interval, 2)
    assert here == there
    first, second = here
    wall = 5 * 0.12 + 0.3  # of the slower process, with its stall and without the pause
    assert first["train/tokens_per_second"] == pytest.approx(5 * 400 / wall)
    assert first["train/tokens_per_second_per_device"] == first["train/tokens_per_second"] / 2
    assert first["train/mfu"] == mfu(first["train/tokens_per_second_per_device"], 1e6, 1e9)
    assert first["train/step_seconds_max"] == pytest.approx(0.12)
    assert first["train/step_seconds_median"] == pytest.approx(0.08)
    # rank 0 waits 100 of 200 + 100 ms, rank 1 300 of 600 + 300
    assert first["train/data_wait_share"] == pytest.approx(1 / 3)
    assert first["train/checkpoint_stall_seconds"] == pytest.approx(0.3)
    assert first["train/peak_memory_gb"] > 0.05
    assert second["train/tokens_per_second"] == second["train/checkpoint_stall_seconds"] == 0


def without_a_peak() -> dict[str, float]:
    ask_for("fsdp2")
    parallel = start_parallel()
    throughput = Throughput()
    throughput.trainer = SimpleNamespace(config=CONFIG, parallel=parallel)  # type: ignore[assignment]
    with throughput.phase():
        metrics = throughput.metrics()
    stop_process_group()
    return metrics


def test_without_a_peak_there_is_no_mfu() -> None:
    assert "train/mfu" not in run_ranks(without_a_peak, 1)[0]
