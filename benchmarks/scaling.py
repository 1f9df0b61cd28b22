"""The model of training speed (cluster/scaling.py) against published runs and against this machine.

python -m benchmarks.scaling                 all runs; table and figure of docs/scaling.md
python -m benchmarks.scaling measure DIR     two processes here; DIR: see benchmarks.training
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import typer

from benchmarks.published import (
    LLAMA_2_7B,
    LLAMA_8B,
    MPT_7B,
    PublishedRun,
    beyond,
    blind,
    published_runs,
)
from cpt_merge.cluster import scaling
from cpt_merge.cluster.scaling import GPUS, Cluster, Workload, estimate_step
from cpt_merge.training.memory import ModelShape

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
FIGURE = Path(__file__).parents[1] / "docs" / "scaling.png"
NODES = list(range(1, 65))
TICKS = [1, 2, 4, 8, 16, 32, 64]
TITLES = (
    "source", "model", "length, sequences x micro-batches, setting", "GPU", "GPUs",
    "published tok/s/GPU", "estimate", "error %",
)  # fmt: skip


@app.callback(invoke_without_command=True)
def compare(context: typer.Context) -> None:
    """Print the tables and draw the figure."""
    if context.invoked_subcommand:
        return
    for runs in (published_runs(), blind()):
        print(f"{table(runs)}\n\n{summary(runs)}\n")
    print(f"{table(beyond())}\n")
    print(f"{by_source([*published_runs(), *blind()])}\n")
    constants = ", ".join(f"{name} {value:.4f}" for name, value in fit(published_runs()).items())
    print(f"refitted: {constants}")
    draw(FIGURE)
    print(f"drawn: {FIGURE}")


@app.command()
def measure(folder: Path, sizes: str = "small,long-vocabulary", rounds: int = 9) -> None:
    """Compare a step of two processes here with the estimate from one process and gloo's speed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from benchmarks.scaling_here import predict

    for size in sizes.split(","):
        predict(folder, size, rounds)


def table(runs: list[PublishedRun]) -> str:
    """Published and estimated speeds as Markdown; runs that differ only in GPUs share a line."""
    lines = [f"| {' | '.join(TITLES)} |", "|---" * len(TITLES) + "|"]
    for _, group in groupby(runs, key=lambda run: (run.source, run.model, run.gpu, run.setting)):
        alike = list(group)
        first = alike[0]
        values = (
            [f"{run.gpus}{'*' if run.fitted else ''}" for run in alike],
            [f"{run.published:,.0f}" for run in alike],
            [f"{run.estimate().tokens_per_second_per_device:,.0f}" for run in alike],
            [f"{100 * run.error:+.1f}" for run in alike],
        )
        cells = [first.source, first.model, first.setting, first.gpu, *map(" / ".join, values)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def by_source(runs: list[PublishedRun]) -> str:
    """The errors of the runs that were not used for fitting, by source and GPU, as Markdown."""
    groups: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        if not run.fitted:
            groups.setdefault((run.source, run.gpu), []).append(100 * run.error)
    lines = ["| source | GPU | runs | median error % | errors % |", "|---|---|---|---|---|"]
    for (source, gpu), errors in groups.items():
        extremes = " to ".join(f"{value:+.0f}" for value in sorted({min(errors), max(errors)}))
        middle = f"{median(map(abs, errors)):.0f}"
        lines.append(f"| {source} | {gpu} | {len(errors)} | {middle} | {extremes} |")
    return "\n".join(lines)


def summary(runs: list[PublishedRun]) -> str:
    """The errors of the runs that were not used for fitting."""
    held_out = [run for run in runs if not run.fitted]
    errors = [abs(run.error) for run in held_out]
    counted = ", ".join(
        f"{sum(error <= limit for error in errors)} within {limit:.0%}"
        for limit in (0.05, 0.10, 0.15)
    )
    worst = max(held_out, key=lambda run: abs(run.error))
    return (
        f"{len(held_out)} of {len(runs)} runs held out: median error {median(errors):.1%}, "
        f"{counted};\n"
        f"worst {worst.error:+.0%} ({worst.source}, {worst.model} on {worst.gpus} {worst.gpu})."
    )


def fit(runs: list[PublishedRun]) -> dict[str, float]:
    """The five fitted constants, from the runs marked for it; `cluster.scaling` has them rounded.

    Each run decides one constant, given the others, by bisection; repeated until they are stable.
    """
    pair = [run for run in runs if run.fitted == "STRAGGLER"]
    ratio = pair[1].published / pair[0].published
    gpus, straggler = dict(GPUS), scaling.STRAGGLER

    def straggling(value: float) -> float:
        scaling.STRAGGLER = value
        small, large = (run.estimate().tokens_per_second_per_device for run in pair)
        return ratio - large / small

    found: dict[str, float] = {}
    try:
        for _ in range(12):
            found["STRAGGLER"] = _bisect(straggling, 0.1)
            for run in runs:
                if run.fitted in ("matmul_share", "interference"):
                    found[f"{run.gpu[:4]} {run.fitted}"] = _bisect(_error_by_constant(run), 2.0)
    finally:
        GPUS.update(gpus)
        scaling.STRAGGLER = straggler
    return found


def _error_by_constant(run: PublishedRun) -> Callable[[float], float]:
    """A run's error as a rising function of the constant that it decides."""
    sign = 1 if run.fitted == "matmul_share" else -1

    def error(value: float) -> float:
        for name, gpu in GPUS.items():
            if name[:4] == run.gpu[:4]:
                constant: dict[str, Any] = {run.fitted: value}
                GPUS[name] = replace(gpu, **constant)
        return sign * run.error

    return error


def _bisect(function: Callable[[float], float], high: float) -> float:
    """The zero of a rising function between 0.001 and `high`; the last call is at the zero."""
    low = 0.001
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return middle


@dataclass(frozen=True)
class ScalingCurve:
    """Speed over the number of nodes, and the published runs on it."""

    name: str
    shape: ModelShape
    work: Workload
    cluster: Cluster
    runs: list[PublishedRun] = field(default_factory=list)

    def speeds(self, layout: str) -> list[float]:
        """Tokens per second and GPU on each number of nodes."""
        return [
            estimate_step(
                self.shape,
                self.work,
                replace(self.cluster, nodes=nodes),
                nodes if layout == "HSDP" else 1,
            ).tokens_per_second_per_device
            for nodes in NODES
        ]


def draw(path: Path) -> None:
    """Tokens per second and GPU over the nodes, under FSDP and HSDP, with the published runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9), constrained_layout=True)
    title = "Llama 3.1 8B, H100 (500 W), 3,200 Gbit/s a node\nlength 8,192, 2 sequences a GPU"
    _panel(axes[0, 0], title, _torchtitan())
    title = "MPT 7B, H100, network not published (3,200 Gbit/s)\nlength 2,048, 6 sequences a GPU"
    _panel(axes[0, 1], title, _accumulated("MPT 7B", "llm-foundry", MPT_7B))
    title = (
        "Llama 2 7B, H100, 800 Gbit/s a node\n"
        "length 4,096, 2 sequences a GPU, gradients reduced in bf16"
    )
    _panel(axes[1, 0], title, _accumulated("Llama 2 7B", "fms-fsdp", LLAMA_2_7B))
    title = (
        "Llama 3.1 8B, H100, 200 Gbit/s a node\n"
        "length 4,096, 2 sequences a GPU, gradients reduced in fp32 (ours)"
    )
    _panel(axes[1, 1], title, _slow_network())
    for axis in axes[:, 0]:
        axis.set_ylabel("tokens per second and GPU")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _torchtitan() -> Iterator[ScalingCurve]:
    found = [run for run in published_runs() if run.gpu == "h100-500w"]
    settings = {"eager": (False, False), "compiled": (True, False), "fp8": (True, True)}
    for name, setting in settings.items():
        runs = [run for run in found if (run.work.compile, run.work.fp8) == setting]
        yield ScalingCurve(name, LLAMA_8B, runs[0].work, runs[0].cluster, runs)


def _accumulated(model: str, source: str, shape: ModelShape) -> Iterator[ScalingCurve]:
    """The runs of a model on H100 with one micro-batch, and the estimate with four."""
    runs = [
        run
        for run in published_runs()
        if (run.model, run.source, run.gpu) == (model, source, "h100")
        and run.work.micro_batches == 1
    ]
    first = runs[0]
    yield ScalingCurve("1 micro-batch", shape, first.work, first.cluster, runs)
    yield ScalingCurve(
        "4 micro-batches", shape, replace(first.work, micro_batches=4), first.cluster
    )


def _slow_network() -> Iterator[ScalingCurve]:
    work = Workload(4096, 2, 1, activation_checkpointing="selective", compile=True)
    cluster = Cluster.of("h100", 1, 8, 200)
    for count in (1, 2, 8):
        name = f"{count} micro-batch{'es' if count > 1 else ''}"
        yield ScalingCurve(name, LLAMA_8B, replace(work, micro_batches=count), cluster)


def _panel(axis: Any, title: str, curves: Iterator[ScalingCurve]) -> None:
    for number, curve in enumerate(curves):
        color = f"C{number}"
        speeds = {layout: curve.speeds(layout) for layout in ("FSDP", "HSDP")}
        for layout, style in (("FSDP", "-"), ("HSDP", "--")):
            label = f"{layout}, {curve.name}"
            axis.plot(NODES, speeds[layout], style, color=color, label=label)
        for run in curve.runs:
            layout, marker = ("HSDP", "s") if run.replicas > 1 else ("FSDP", "o")
            labelled = run is curve.runs[0] and not number
            axis.plot(
                run.cluster.nodes,
                run.published,
                marker,
                color=color,
                markeredgecolor="black",
                label=f"published, {layout}" if labelled else None,
            )
        _mark_crossings(axis, speeds, color)
    axis.set(title=title, xscale="log", xticks=TICKS, xticklabels=TICKS, xlabel="nodes of 8 GPUs")
    axis.set_ylim(0, 1.12 * axis.dataLim.ymax)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="best")


def _mark_crossings(axis: Any, speeds: dict[str, list[float]], color: str) -> None:
    """Mark where the faster layout changes, if the new one gets at least 2 % ahead."""
    ahead = [hsdp / fsdp - 1 for fsdp, hsdp in zip(speeds["FSDP"], speeds["HSDP"], strict=True)]
    runs = [list(group) for _, group in groupby(NODES[1:], key=lambda nodes: ahead[nodes - 1] > 0)]
    for run in runs[1:] if ahead[1] <= 0 else runs:
        if max(abs(ahead[nodes - 1]) for nodes in run) > 0.02:
            winner = "HSDP" if ahead[run[0] - 1] > 0 else "FSDP"
            place = (run[0], speeds[winner][run[0] - 1])
            axis.plot(*place, "X", color=color, markersize=9, markeredgecolor="black")
            text = f"{winner} from {run[0]}"
            axis.annotate(text, place, textcoords="offset points", xytext=(5, 8), fontsize=8)


if __name__ == "__main__":
    app()
