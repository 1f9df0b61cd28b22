"""Run a function in several real processes that form a gloo group, as torchrun would."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

import torch


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(
    function: Callable[..., Any], size: int, *arguments: Any, timeout: float = 120
) -> list[Any]:
    """The results of `function(*arguments)` in `size` processes, by rank.

    The first failure is raised with its traceback.
    """
    context: Any
    if torch.cuda.is_available():
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    else:
        # a clean process that has imported the slow packages once
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.preloaded"])
    queue: Any = context.Queue()
    port = free_port()
    processes = [
        context.Process(
            target=_child, args=(function, rank, size, port, queue, arguments), daemon=True
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        deadline = time.monotonic() + timeout
        while len(results) < size:
            try:
                rank, result, failure = queue.get(timeout=0.2)
            except Empty:
                _raise_if_dead(processes, results, deadline)
                continue
            if failure:
                raise AssertionError(f"rank {rank} failed:\n{failure}")
            results[rank] = result
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    return [results[rank] for rank in range(size)]


def _raise_if_dead(processes: list[Any], results: dict[int, Any], deadline: float) -> None:
    for rank, process in enumerate(processes):
        if rank not in results and process.exitcode not in (None, 0):
            raise AssertionError(f"rank {rank} was killed: exit code {process.exitcode}")
    if time.monotonic() > deadline:
        raise AssertionError(
            f"ranks {sorted(set(range(len(processes))) - set(results))} do not end"
        )


def _child(
    function: Callable[..., Any],
    rank: int,
    size: int,
    port: int,
    queue: Any,
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)  # torch was imported before the fork, so OMP_NUM_THREADS is too late
    try:
        queue.put((rank, function(*arguments), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
