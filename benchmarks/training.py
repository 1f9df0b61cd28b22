"""Benchmarks of training.

    python -m benchmarks.training prepare DIR [--size 3b]    random Llamas and token stores
    python -m benchmarks.training trainer DIR                speed and memory of training loops
    python -m benchmarks.training checkpoint DIR             how long a save holds up training

Results are printed and written to DIR/training-*.json. Lightning takes part if `--lightning` names
a folder that it was installed into:

    pip install --no-deps --target FOLDER lightning==2.6.6 lightning-utilities torchmetrics
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import typer

from benchmarks import training_contenders, training_inputs, training_peers
from benchmarks.processor import processor
from benchmarks.training_checkpoints import Save, measure_saves
from benchmarks.training_contenders import TimedInterval, TrainingCase, enter, join
from benchmarks.training_inputs import Inputs

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
CONTENDERS: dict[str, training_contenders.Contender] = {
    "ours": training_contenders.ours,
    "bare": training_contenders.bare,
    "trainer": training_peers.trainer,
    "lightning": training_peers.lightning,
}
LENGTH = 512


@dataclass(frozen=True)
class Row:
    """Of the table: a model and how it is trained."""

    size: str  # of training_inputs.SIZES
    interval: int  # steps
    lora: bool = False


ROWS = {
    "small": Row("small", 2),
    "long-vocabulary": Row("long-vocabulary", 1),
    "experts": Row("experts", 2),
    "lora": Row("small", 2, lora=True),
}


@app.command()
def prepare(
    folder: Path,
    size: str = "",
    tokens: int = 2_000_000,
    document: int = training_inputs.MEDIAN_DOCUMENT,
) -> None:
    """Make the inputs of a size, or those that a CPU can train, unless they exist."""
    for name in [size] if size else sorted({row.size for row in ROWS.values()}):
        training_inputs.prepare(folder, name, tokens, document)


@app.command()
def trainer(
    folder: Path, rounds: int = 3, intervals: int = 5, rows: str = ",".join(ROWS),
    precisions: str = "fp32,bf16", processes: str = "1,2", lightning: Path | None = None,
) -> None:  # fmt: skip
    """Contenders train the same model in turn, in every precision and number of processes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    names = list(CONTENDERS)
    if lightning:
        os.environ[training_peers.LIGHTNING] = str(lightning.resolve())
    else:
        names.remove("lightning")
    results: dict[str, dict[str, Any]] = {}
    _show_header()
    for row, precision, count in itertools.product(
        rows.split(","), precisions.split(","), processes.split(",")
    ):
        case = TrainingCase(
            Inputs.of(folder, ROWS[row].size), precision, int(count), LENGTH, 2, 1,
            ROWS[row].interval, intervals, ROWS[row].lora,
        )  # fmt: skip
        found = [turn for number in range(rounds) for turn in _round(names, case, number)]
        name = f"{row}, {precision}, {count}"
        results[name] = _summary(names, case, found)
        _show(name, results[name])
    written = {"processor": processor(), "results": results}
    (folder / "training-trainer.json").write_text(json.dumps(written, indent=1))


class Processes:
    """The processes of one contender, which train when they are told to."""

    def __init__(self, name: str, case: TrainingCase) -> None:
        context, port = multiprocessing.get_context("spawn"), free_port()
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(case.processes):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=enter,
                args=(CONTENDERS[name], case, rank, port, theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.connections.append(mine)
            self.processes.append(process)
        self.warmed_up = self.wait()

    def interval(self) -> list[TimedInterval]:
        """Train one interval; what each process found."""
        self.start()
        return self.wait()

    def start(self) -> None:
        """Begin an interval."""
        for connection in self.connections:
            connection.send(None)

    def wait(self) -> list[TimedInterval]:
        """The end of an interval. Raises EOFError if a process died."""
        return [connection.recv() for connection in self.connections]

    def end(self) -> None:
        """Wait for the processes to end."""
        for process in self.processes:
            process.join(timeout=30)
            process.kill()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _round(
    names: list[str], case: TrainingCase, number: int
) -> Iterator[dict[str, list[TimedInterval]]]:
    """Start every contender, and let them train interval by interval in changing order."""
    contenders = {name: Processes(name, case) for name in names}
    for turn in range(case.intervals):
        shift = (number + turn) % len(names)
        found = {name: contenders[name].interval() for name in names[shift:] + names[:shift]}
        _check_same(found)
        yield found
    for contender in contenders.values():
        contender.end()


def _check_same(found: dict[str, list[TimedInterval]]) -> None:
    """All train the same: their losses agree (Trainer's is a mean over the interval's steps)."""
    losses = {name: intervals[0].loss for name, intervals in found.items()}
    if max(losses.values()) - min(losses.values()) > 0.05:
        raise SystemExit(f"the contenders do not train the same: losses {losses}")


def _summary(
    names: list[str], case: TrainingCase, found: list[dict[str, list[TimedInterval]]]
) -> dict[str, Any]:
    """Medians over all intervals; a ratio is taken within one turn of the contenders."""
    walls = {name: [max(one.wall for one in turn[name]) for turn in found] for name in names}
    alone = {
        name: [max(one.wall - one.delay for one in turn[name]) for turn in found] for name in names
    }
    cpus = {name: [sum(one.cpu for one in turn[name]) for turn in found] for name in names}
    peaks = {name: max(one.peak for turn in found for one in turn[name]) for name in names}
    return {
        "tokens per second": {name: case.tokens / median(walls[name]) for name in names},
        "peak MB": peaks,
        "speed": {name: _ratios(walls, name) for name in names[1:]},
        "alone": {name: _ratios(alone, name) for name in names[1:]},
        "CPU": {name: _ratios(cpus, name) for name in names[1:]},
        "memory": {name: peaks["ours"] / peaks[name] for name in names[1:]},
        "seconds": walls,
        "seconds without waiting for a CPU": alone,
        "CPU seconds": cpus,
    }


def _ratios(seconds: dict[str, list[float]], other: str) -> list[float]:
    """Our speed over the other's: median, and the quartiles."""
    ratios = [theirs / mine for mine, theirs in zip(seconds["ours"], seconds[other], strict=True)]
    low, middle, high = quantiles(ratios, n=4)
    return [middle, low, high]


def _show_header() -> None:
    print(processor())
    print(
        "our speed over theirs: by the wall clock, without waiting for a CPU, by CPU time; memory"
    )


def _show(name: str, summary: dict[str, Any]) -> None:
    rate, peak = summary["tokens per second"]["ours"], summary["peak MB"]["ours"]
    print(f"{name}: {rate:,.0f} tokens/s, {peak:,.0f} MB")
    for other in summary["speed"]:
        shown = [f"{middle:.3f} ({low:.2f}-{high:.2f})" for middle, low, high in
                 (summary[kind][other] for kind in ("speed", "alone", "CPU"))]  # fmt: skip
        print(
            f"    against {other:8} {'   '.join(shown)}   {summary['memory'][other]:.2f}",
            flush=True,
        )


@app.command()
def checkpoint(
    folder: Path, rounds: int = 5, processes: str = "1,2", size: str = "long-vocabulary"
) -> None:
    """Compare the stall of an asynchronous save with that of a synchronous one."""
    os.environ["OMP_NUM_THREADS"] = "1"
    results = {}
    for count in map(int, processes.split(",")):
        case = TrainingCase(Inputs.of(folder, size), "fp32", count, LENGTH, count, 1, 1, 1)
        with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
            port = free_port()
            work = [
                pool.submit(_saves, case, rank, port, folder / "saves", rounds)
                for rank in range(count)
            ]
            (nbytes, saves), *_ = (future.result() for future in work)
        kinds = {
            kind: [save for save in saves if save.synchronous == kind] for kind in (True, False)
        }
        stalls = {kind: median(save.stall for save in kinds[kind]) for kind in kinds}
        share = median(
            mine.stall / theirs.stall
            for mine, theirs in zip(kinds[False], kinds[True], strict=True)
        )
        slower = median(save.step / save.quiet_step for save in kinds[False])
        print(
            f"{count} process{'es' if count > 1 else ''}, {nbytes / 1e9:.2f} GB: "
            f"synchronous {stalls[True]:.2f} s, stall {stalls[False]:.3f} s, {share:.1%}; "
            f"a step during the write takes {slower:.2f} times as long",
            flush=True,
        )
        results[count] = [asdict(save) for save in saves]
    (folder / "training-checkpoint.json").write_text(json.dumps(results, indent=1))


def _saves(
    case: TrainingCase, rank: int, port: int, out: Path, rounds: int
) -> tuple[int, list[Save]]:
    join(case, rank, port)
    return measure_saves(case, out, rounds)


if __name__ == "__main__":
    app()
