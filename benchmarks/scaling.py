"""The model of training's speed (training/scaling.py), against what was published and what this machine does.

python -m benchmarks.scaling                 the table and the figure of docs/scaling.md
python -m benchmarks.scaling measure DIR     two processes here, predicted and measured; DIR: see benchmarks.training
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import typer

from benchmarks.published import LLAMA_2_7B, LLAMA_8B, MPT_7B, Row, beyond, blind, rows
from cpt_merge.cluster import scaling
from cpt_merge.cluster.scaling import GPUS, Cluster, Workload, estimate_step
from cpt_merge.training.memory import ModelShape

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
FIGURE = Path(__file__).parents[1] / "docs" / "scaling.png"
NODES = list(range(1, 65))
TICKS = [1, 2, 4, 8, 16, 32, 64]


@app.callback(invoke_without_command=True)
def compare(context: typer.Context) -> None:
    """Print the tables, and draw the figure."""
    if context.invoked_subcommand:
        return
    for published in (rows(), blind()):
        print(f"{table(published)}\n\n{summary(published)}\n")
    print(f"{table(beyond())}\n")
    print("refitted: " + ", ".join(f"{name} {value:.4f}" for name, value in fit(rows()).items()))
    draw(FIGURE)
    print(f"drawn: {FIGURE}")


@app.command()
def measure(folder: Path, sizes: str = "small,long-vocabulary", rounds: int = 9) -> None:
    """Two processes on this machine: what a step takes, and what the model says from one process and gloo's speed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from benchmarks.scaling_here import predict

    for size in sizes.split(","):
        predict(folder, size, rounds)


def table(published: list[Row]) -> str:
    """Published and estimated speeds as markdown; runs that differ in their GPUs only share a line. Fitted runs: *."""
    lines = [
        "| source | model | rows, micro-batches, setting | GPU | GPUs | published tok/s/GPU | model | off % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for _, group in groupby(
        published, key=lambda row: (row.source, row.model, row.gpu, row.setting)
    ):
        runs = list(group)
        first = runs[0]
        cells = [
            first.source, first.model, first.setting, first.gpu,
            _joined(f"{run.gpus}{'*' if run.fitted else ''}" for run in runs),
            _joined(f"{run.published:,.0f}" for run in runs),
            _joined(f"{run.estimate().tokens_per_second_per_device:,.0f}" for run in runs),
            _joined(f"{100 * run.off:+.1f}" for run in runs),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _joined(words: Iterable[str]) -> str:
    return " / ".join(words)


def summary(published: list[Row]) -> str:
    """How far off the runs are that nothing was fitted on."""
    held = [row for row in published if not row.fitted]
    off = sorted(abs(row.off) for row in held)
    within = {limit: sum(each <= limit for each in off) for limit in (0.05, 0.10, 0.15)}
    counted = ", ".join(f"{count} within {limit:.0%}" for limit, count in within.items())
    worst = max(held, key=lambda row: abs(row.off))
    return (
        f"{len(held)} runs held out of {len(published)}: median {median(off):.1%} off, {counted}; "
        f"worst {worst.off:+.0%} ({worst.source}, {worst.model} on {worst.gpus} {worst.gpu})."
    )


def fit(published: list[Row]) -> dict[str, float]:
    """The five fitted constants, from the runs marked so. The constants of `training.scaling` are these, rounded.

    Each run decides one constant, given the others: bisection, in turns until they stand.
    """
    pair = [row for row in published if row.fitted == "STRAGGLER"]
    ratio = pair[1].published / pair[0].published
    kept = dict(GPUS), scaling.STRAGGLER
    found: dict[str, float] = {}
    try:
        for _ in range(12):
            found["STRAGGLER"] = _bisect(lambda value: ratio - _straggling(pair, value), 0.1)
            for row in published:
                if row.fitted in ("matmul_share", "interference"):
                    sign = 1 if row.fitted == "matmul_share" else -1
                    found[f"{row.gpu[:4]} {row.fitted}"] = _bisect(_difference(row, sign), 2.0)
    finally:
        GPUS.update(kept[0])
        scaling.STRAGGLER = kept[1]
    return found


def _straggling(pair: list[Row], value: float) -> float:
    scaling.STRAGGLER = value
    small, large = (row.estimate().tokens_per_second_per_device for row in pair)
    return large / small


def _difference(row: Row, sign: int) -> Callable[[float], float]:
    """What the run is off by, as a function of its constant."""

    def off(value: float) -> float:
        for name, gpu in GPUS.items():
            if name[:4] == row.gpu[:4]:
                constant: dict[str, Any] = {row.fitted: value}
                GPUS[name] = replace(gpu, **constant)
        return sign * row.off

    return off


def _bisect(function: Callable[[float], float], high: float) -> float:
    """Where a rising function is zero, between 0.001 and `high`; it is called last where it is."""
    low = 0.001
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return middle


def draw(path: Path) -> None:
    """Tokens per second and GPU over the nodes, FSDP and HSDP, and the published runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9), constrained_layout=True)
    _panel(
        axes[0, 0],
        "Llama 3.1 8B, H100 (500 W), 3,200 Gbit/s a node\nrows of 8,192, 2 a GPU",
        _torchtitan_lines(),
    )
    _panel(
        axes[0, 1],
        "MPT 7B, H100, network not said (3,200 Gbit/s)\nrows of 2,048, 6 a GPU",
        _mpt_lines(),
    )
    title = "Llama 2 7B, H100, 800 Gbit/s a node\nrows of 4,096, 2 a GPU, gradients reduced in bf16"
    _panel(axes[1, 0], title, _fms_lines())
    title = "Llama 3.1 8B, H100, 200 Gbit/s a node\nrows of 4,096, 2 a GPU, gradients reduced in fp32 (ours)"
    _panel(axes[1, 1], title, _slow_lines())
    for axis in axes[:, 0]:
        axis.set_ylabel("tokens per second and GPU")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


Line = tuple[str, ModelShape, Workload, Cluster, list[Row]]


def _torchtitan_lines() -> Iterator[Line]:
    found = [row for row in rows() if row.gpu == "h100-500w"]
    for name, (compiled, fp8) in {
        "eager": (False, False),
        "compiled": (True, False),
        "fp8": (True, True),
    }.items():
        runs = [row for row in found if (row.work.compile, row.work.fp8) == (compiled, fp8)]
        yield name, LLAMA_8B, runs[0].work, runs[0].cluster, runs


def _mpt_lines() -> Iterator[Line]:
    runs = [
        row
        for row in rows()
        if row.model == "MPT 7B" and row.gpu == "h100" and row.work.sequence_length == 2048
    ]
    yield "1 micro-batch", MPT_7B, runs[0].work, runs[0].cluster, runs
    yield "4 micro-batches", MPT_7B, replace(runs[0].work, micro_batches=4), runs[0].cluster, []


def _fms_lines() -> Iterator[Line]:
    runs = [
        row for row in rows() if row.source == "fms-fsdp" and row.gpu == "h100" and row.replicas > 1
    ]
    yield "1 micro-batch", LLAMA_2_7B, runs[0].work, runs[0].cluster, runs
    yield "4 micro-batches", LLAMA_2_7B, replace(runs[0].work, micro_batches=4), runs[0].cluster, []


def _slow_lines() -> Iterator[Line]:
    work = Workload(4096, 2, 1, activation_checkpointing="selective", compile=True)
    for count in (1, 2, 8):
        name = f"{count} micro-batch{'es' if count > 1 else ''}"
        yield name, LLAMA_8B, replace(work, micro_batches=count), Cluster.of("h100", 1, 8, 200), []


def _panel(axis: Any, title: str, lines: Iterator[Line]) -> None:
    for number, (name, shape, work, cluster, runs) in enumerate(lines):
        speeds = {}
        for layout in ("FSDP", "HSDP"):
            speeds[layout] = [
                _speed(shape, work, replace(cluster, nodes=nodes), layout) for nodes in NODES
            ]
            style = {"FSDP": "-", "HSDP": "--"}[layout]
            axis.plot(NODES, speeds[layout], style, color=f"C{number}", label=f"{layout}, {name}")
        for row in runs:
            marker = "s" if row.replicas > 1 else "o"
            label = (
                f"published, {'HSDP' if row.replicas > 1 else 'FSDP'}"
                if row is runs[0] and not number
                else None
            )
            axis.plot(
                row.cluster.nodes,
                row.published,
                marker,
                color=f"C{number}",
                markeredgecolor="black",
                label=label,
            )
        _mark_crossings(axis, speeds, f"C{number}")
    axis.set(
        title=title,
        xscale="log",
        xticks=TICKS,
        xticklabels=TICKS,
        xlabel="nodes of 8 GPUs",
        ylim=(0, 1.12 * axis.dataLim.ymax),
    )
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="best")


def _speed(shape: ModelShape, work: Workload, cluster: Cluster, layout: str) -> float:
    replicas = cluster.nodes if layout == "HSDP" else 1
    return estimate_step(shape, work, cluster, replicas).tokens_per_second_per_device


def _mark_crossings(axis: Any, speeds: dict[str, list[float]], color: str) -> None:
    """A cross where the faster one changes, if the new one comes to be 2 % ahead."""
    ahead = [hsdp / fsdp - 1 for fsdp, hsdp in zip(speeds["FSDP"], speeds["HSDP"], strict=True)]
    runs = [list(group) for _, group in groupby(NODES[1:], key=lambda nodes: ahead[nodes - 1] > 0)]
    for run in runs[1:] if ahead[1] <= 0 else runs:
        if max(abs(ahead[nodes - 1]) for nodes in run) > 0.02:
            winner = "HSDP" if ahead[run[0] - 1] > 0 else "FSDP"
            place = (run[0], speeds[winner][run[0] - 1])
            axis.plot(*place, "X", color=color, markersize=9, markeredgecolor="black")
            axis.annotate(
                f"{winner} from {run[0]}",
                place,
                textcoords="offset points",
                xytext=(5, 8),
                fontsize=8,
            )


if __name__ == "__main__":
    app()
