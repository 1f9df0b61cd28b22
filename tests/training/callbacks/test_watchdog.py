"""The watchdog, with processes that really hang."""

import multiprocessing
import re
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cpt_merge.training.callbacks.watchdog import Watchdog
from tests.distributed import run_ranks


def oversleep() -> None:
    time.sleep(2)


def one_oversleeps(folder: Path) -> list[str]:
    """Rank 1 is late for a collective in which rank 0 waits; returns the alarms of this rank."""
    dist.init_process_group("gloo")
    rank, alarms = dist.get_rank(), list[str]()
    with Watchdog(0.5, folder, rank, alarms.append) as watchdog:
        watchdog.beat("step 17")
        if rank == 1:
            oversleep()
        dist.all_reduce(torch.ones(1))
        watchdog.beat("step 18")
    dist.destroy_process_group()
    return alarms


def test_every_rank_writes_where_it_hangs(tmp_path: Path) -> None:
    alarms = run_ranks(one_oversleeps, 2, tmp_path)
    waiting, sleeping = ((tmp_path / f"stacks-rank-{rank:05d}.txt").read_text() for rank in (0, 1))
    assert "in all_reduce" in waiting
    assert "in oversleep" not in waiting
    assert "in oversleep" in sleeping
    for rank, text in enumerate((waiting, sleeping)):
        assert f"rank {rank}: " in text
        assert "after 'step 17'" in text
        assert text.count("after 'step 17'") >= 2  # again after each further interval
        assert len(alarms[rank]) == 1
        assert "stacks-rank-" in alarms[rank][0]


def test_beats_keep_it_quiet_and_leave_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Watchdog(2, tmp_path, 0, pytest.fail) as watchdog:
        for step in range(25):
            time.sleep(0.1)
            watchdog.beat(f"step {step}")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == ""


def test_a_second_silence_is_a_second_alarm_and_an_alarm_may_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alarms = []

    def alarm(text: str) -> None:
        alarms.append(text)
        raise OSError("no network")

    with Watchdog(0.5, tmp_path, 3, alarm) as watchdog:
        for number, what in enumerate(("step 1", "step 2"), 1):
            watchdog.beat(what)
            deadline = time.monotonic() + 60
            while len(alarms) < number:
                assert time.monotonic() < deadline
                time.sleep(0.02)
    assert ["'step 1'" in alarms[0], "'step 2'" in alarms[1]] == [True, True]
    lines = capsys.readouterr().err.splitlines()
    assert sum("rank 3 on" in line and "stacks-rank-00003.txt" in line for line in lines) == 2
    assert sum("no network" in line for line in lines) == 2
    assert threading.active_count() == 1 or not any(
        thread.name == "watchdog" for thread in threading.enumerate()
    )


def stuck(folder: Path) -> None:
    """The search for a match that does not exist is one C call, which lets no other thread run."""
    with Watchdog(0.3, folder, 0, lambda text: None):
        re.match("(a|aa)+$", "a" * 60 + "b")


def test_a_process_that_holds_the_interpreter_is_seen_too(tmp_path: Path) -> None:
    process = multiprocessing.get_context("forkserver").Process(target=stuck, args=(tmp_path,))
    process.start()
    path, deadline = tmp_path / "stacks-rank-00000.txt", time.monotonic() + 60
    try:
        while not (path.is_file() and "in stuck" in path.read_text()):
            assert process.is_alive(), "it was not stuck for long enough"
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.kill()
        process.join()


def test_a_beat_costs_a_training_step_nothing(tmp_path: Path) -> None:
    with Watchdog(60, tmp_path, 0, pytest.fail) as watchdog:
        start = time.thread_time()
        for _ in range(1000):
            watchdog.beat("step")
        assert (time.thread_time() - start) / 1000 < 50e-6
