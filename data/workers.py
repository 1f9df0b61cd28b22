"""A task in several processes on this machine, with progress. If one fails, all end."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from queue import Empty
from typing import Any

from cpt_merge.core.errors import UserError


@dataclass(frozen=True)
class Progress:
    """What was done since the last report."""

    documents: int
    tokens: int
    bytes: float  # that were read


Report = Callable[[Progress], None]
Task = Callable[[int, Report], None]  # (which of the processes, report)

_POLL = 0.5  # seconds


def processes_for(work: float, least: float) -> int:
    """One per core that this process may use, but each with at least so much of the work."""
    cores = int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or len(os.sched_getaffinity(0))
    return max(1, min(cores, int(work // least)))


def start_server(modules: Sequence[str]) -> None:
    """Begin to import what the processes need, once for all of them, while this one goes on."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(modules))
    forkserver.ensure_running()


def run_in_processes(task: Task, processes: int, report: Report, setting: str) -> None:
    """Call `task(number, report)` for every number below `processes`, each in its own process.

    A single task runs in this process. Raises what the first failing task raised, after ending the
    others. `task` must be picklable. `setting`: the recipe's key for the number of processes.
    """
    if processes == 1:
        with one_thread():
            task(0, report)
        return
    context = multiprocessing.get_context("forkserver")
    queue: Any = context.Queue()
    workers = [
        context.Process(target=_child, args=(task, number, queue), daemon=True)
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    try:
        _listen(queue, workers, report, setting)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()


def _listen(queue: Any, workers: list[Any], report: Report, setting: str) -> None:
    running = len(workers)
    while running:
        try:
            kind, value = queue.get(timeout=_POLL)
        except Empty:
            for worker in workers:
                if worker.exitcode not in (None, 0):
                    raise UserError(
                        f"a tokenising process was killed (exit code {worker.exitcode}), often "
                        f"because memory ran out; lower {setting} and run the same command "
                        "again, which continues."
                    ) from None
            continue
        if kind == "error":
            raise value
        if kind == "end":
            running -= 1
        else:
            report(value)


def _child(task: Task, number: int, queue: Any) -> None:
    parent = multiprocessing.parent_process()

    def report(done: Progress) -> None:
        if parent is not None and not parent.is_alive():
            sys.exit(1)  # no process is left that would join the parts
        queue.put(("report", done))

    try:
        with one_thread():
            task(number, report)
        queue.put(("end", None))
    except (UserError, OSError) as error:
        queue.put(("error", error))
    except Exception:
        queue.put(("error", RuntimeError(traceback.format_exc())))


@contextmanager
def one_thread() -> Iterator[None]:
    """Switch off threads, since the processes use the cores.

    tokenizers reads its variable at every call.
    """
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.__setitem__(name, before)
