"""Training, measured.

    python -m benchmarks.training prepare DIR [--size 3b]     random Llamas and token stores
    python -m benchmarks.training trainer DIR                 tokens per second and memory, beside Trainer and a bare loop
    python -m benchmarks.training checkpoint DIR              how long a save holds up training
    python -m benchmarks.training gpu DIR --size 3b           MFU on one GPU, and a profile that shows the rest

Results are printed and written to DIR/training-*.json.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import typer

from benchmarks import training_inputs
from benchmarks.training_contenders import Case, Interval, enter
from benchmarks.training_inputs import Inputs

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
NAMES = ("ours", "bare", "trainer")
LENGTH = 512


@app.command()
def prepare(folder: Path, size: str = "", tokens: int = 2_000_000) -> None:
    """Make the inputs of a size, or those that a CPU can train; what is there is kept."""
    for name in [size] if size else ["small", "long-vocabulary"]:
        training_inputs.prepare(folder, name, tokens)


@app.command()
def trainer(
    folder: Path, rounds: int = 3, intervals: int = 5, sizes: str = "small,long-vocabulary",
    precisions: str = "fp32,bf16", processes: str = "1,2",
) -> None:  # fmt: skip
    """The same model on the same rows by three contenders in turn, in every precision and number of processes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    results: dict[str, dict[str, Any]] = {}
    _show_header()
    for size, precision, count in itertools.product(sizes.split(","), precisions.split(","), processes.split(",")):
        steps = 2 if size == "small" else 1
        case = Case(Inputs.of(folder, size), precision, int(count), LENGTH, 2, 1, steps, intervals)
        found = [interval for number in range(rounds) for interval in _round(case, number)]
        name = f"{size}, {precision}, {count}"
        results[name] = _summary(case, found)
        _show(name, results[name])
    (folder / "training-trainer.json").write_text(json.dumps(results, indent=1))


class _Contender:
    """The processes of one contender, which train when they are told to."""

    def __init__(self, name: str, case: Case) -> None:
        context, port = multiprocessing.get_context("spawn"), _free_port()
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(case.processes):
            mine, theirs = context.Pipe()
            process = context.Process(target=enter, args=(name, case, rank, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(mine)
            self.processes.append(process)
        self.warmed_up = self.wait()

    def interval(self) -> list[Interval]:
        """Train one interval; what each process found."""
        for connection in self.connections:
            connection.send(None)
        return self.wait()

    def wait(self) -> list[Interval]:
        """The end of an interval. Raises EOFError if a process died."""
        return [connection.recv() for connection in self.connections]

    def end(self) -> None:
        """Wait for the processes to end."""
        for process in self.processes:
            process.join(timeout=30)
            process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _round(case: Case, number: int) -> Iterator[dict[str, list[Interval]]]:
    """Fresh processes of every contender; interval for interval, what each found. The order changes every time."""
    contenders = {name: _Contender(name, case) for name in NAMES}
    for turn in range(case.intervals):
        shift = (number + turn) % len(NAMES)
        found = {name: contenders[name].interval() for name in NAMES[shift:] + NAMES[:shift]}
        _check_same(found)
        yield found
    for contender in contenders.values():
        contender.end()


def _check_same(found: dict[str, list[Interval]]) -> None:
    """All train the same: their losses agree (Trainer's is a mean over the interval's steps)."""
    losses = {name: intervals[0].loss for name, intervals in found.items()}
    if max(losses.values()) - min(losses.values()) > 0.05:
        raise SystemExit(f"the contenders do not train the same: losses {losses}")


def _summary(case: Case, found: list[dict[str, list[Interval]]]) -> dict[str, Any]:
    """Medians over all intervals; a ratio is taken within one turn of the contenders."""
    walls = {name: [max(one.wall for one in turn[name]) for turn in found] for name in NAMES}
    cpus = {name: [sum(one.cpu for one in turn[name]) for turn in found] for name in NAMES}
    peaks = {name: max(one.peak for turn in found for one in turn[name]) for name in NAMES}
    return {
        "tokens per second": {name: case.tokens / median(walls[name]) for name in NAMES},
        "peak MB": peaks,
        "speed": {name: _ratios(walls, name) for name in NAMES[1:]},
        "CPU": {name: _ratios(cpus, name) for name in NAMES[1:]},
        "memory": {name: peaks["ours"] / peaks[name] for name in NAMES[1:]},
        "seconds": walls,
        "CPU seconds": cpus,
    }


def _ratios(seconds: dict[str, list[float]], other: str) -> list[float]:
    """Our speed over the other's: median, and the quartiles."""
    ratios = [theirs / mine for mine, theirs in zip(seconds["ours"], seconds[other], strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    return [middle, low, high]


def _show_header() -> None:
    print(f"{'':36}{'tokens/s':>9}{'MB':>7}   {'x Trainer':20}{'by CPU time':20}{'MB':>5}   {'x bare':20}by CPU time")


def _show(name: str, summary: dict[str, Any]) -> None:
    def shown(kind: str, other: str) -> str:
        middle, low, high = summary[kind][other]
        return f"{middle:.3f} ({low:.2f}-{high:.2f})".ljust(20)

    rate, peak = summary["tokens per second"]["ours"], summary["peak MB"]["ours"]
    print(
        f"{name:36}{rate:9,.0f}{peak:7,.0f}   {shown('speed', 'trainer')}{shown('CPU', 'trainer')}"
        f"{summary['memory']['trainer']:5.2f}   {shown('speed', 'bare')}{shown('CPU', 'bare')}",
        flush=True,
    )


if __name__ == "__main__":
    app()
