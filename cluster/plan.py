"""`cpt-merge plan --gpu`: how long training would take on a cluster that is not here, under FSDP and HSDP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from cpt_merge.cluster.scaling import (
    GIGA,
    Cluster,
    StepEstimate,
    Workload,
    checkpoint_cost,
    estimate_step,
    fits,
    hsdp_ranges,
    memory_on,
)
from cpt_merge.core.errors import UserError
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.memory import MemoryEstimate, ModelShape

DAY = 24.0  # hours
LIMIT = 256  # nodes up to which a crossing is looked for


@dataclass(frozen=True)
class Request:
    """The cluster that is asked about."""

    gpu: str
    nodes: int = 1
    gpus_per_node: int = 8
    network: float | None = None  # Gbit/s of a node
    storage: float = 5.0  # GB/s of all processes together

    @property
    def cluster(self) -> Cluster:
        """Raises `UserError` for a GPU that is not known."""
        return Cluster.of(self.gpu, self.nodes, self.gpus_per_node, self.network)

    def workload(self, config: TrainingConfig) -> Workload:
        """What each GPU does. Raises `UserError` for what does not fit together."""
        gpu = self.cluster.gpu
        if config.fp8 and not gpu.fp8:
            raise UserError(
                f"training.fp8 is set but {gpu.name} has no float8 matmuls; set it to false."
            )
        return Workload.of(config, self.cluster.ranks)


@dataclass(frozen=True)
class Column:
    """A layout of a cluster, and what it costs."""

    replicas: int
    step: StepEstimate
    memory: MemoryEstimate
    fits: bool

    @property
    def title(self) -> str:
        """Its name."""
        return "FSDP" if self.replicas == 1 else f"HSDP, {self.replicas} replicas"


def columns(shape: ModelShape, work: Workload, cluster: Cluster) -> list[Column]:
    """FSDP over all GPUs; and on several nodes HSDP with a replica a node."""
    found = []
    for replicas in sorted({1, cluster.nodes}):
        step, memory = (
            estimate_step(shape, work, cluster, replicas),
            memory_on(shape, work, cluster, replicas),
        )
        found.append(Column(replicas, step, memory, fits(memory, cluster.gpu)))
    return found


def show_cluster(
    console: Console, shape: ModelShape, config: TrainingConfig, request: Request
) -> None:
    """The step, the run, memory and checkpoints on the cluster; and the same on other numbers of nodes."""
    cluster, work = request.cluster, request.workload(config)
    network = f", {cluster.network * 8 / GIGA:,.0f} Gbit/s a node" if cluster.nodes > 1 else ""
    console.print(
        f"\n[bold]estimate[/] for {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}{network}: "
        f"{work.micro_batches} micro-batches of {work.micro_batch_size:g} sequences on each GPU; "
        "how far off such estimates are: docs/scaling.md"
    )
    found = columns(shape, work, cluster)
    _print_details(console, found, _details(shape, work, cluster, config, request, found))
    _print_sweep(console, shape, config, cluster)
    console.print(_crossing(shape, work, cluster), markup=False)


def _details(
    shape: ModelShape,
    work: Workload,
    cluster: Cluster,
    config: TrainingConfig,
    request: Request,
    found: list[Column],
) -> Iterator[tuple[str, list[str]]]:
    """Rows of the first table: what, and its value for each column."""
    steps = [column.step for column in found]
    for name in (
        "matmul",
        "attention",
        "elementwise",
        "copies",
        "optimizer",
        "exposed",
        "contention",
        "stragglers",
    ):
        label = {"exposed": "exposed communication"}.get(name, name)
        yield f"  {label}", [f"{getattr(step, name) * 1000:,.1f} ms" for step in steps]
    yield "one step", [f"{step.seconds:,.3f} s" for step in steps]
    yield "tokens per second", [f"{step.tokens_per_second:,.0f}" for step in steps]
    yield "per GPU", [f"{step.tokens_per_second_per_device:,.0f}" for step in steps]
    yield "MFU", [f"{step.mfu:.1%}" for step in steps]
    yield "exposed communication", [f"{step.exposed_share:.1%}" for step in steps]
    hours = [step.hours(config.steps * config.tokens_per_step) for step in steps]
    yield f"{config.tokens / GIGA:,.2f} G tokens", [f"{each / DAY:,.2f} days" for each in hours]
    yield "", [f"{each * cluster.ranks:,.0f} GPU-hours" for each in hours]
    for name in vars(found[0].memory):
        yield (
            f"  {name.replace('_', ' ')}",
            [f"{getattr(column.memory, name) / GIGA:,.2f} GB" for column in found],
        )
    yield "memory at once", [_memory(column, cluster) for column in found]
    costs = [
        checkpoint_cost(shape, work, cluster, column.replicas, request.storage * GIGA)
        for column in found
    ]
    yield "a checkpoint", [f"{cost.size / GIGA:,.1f} GB" for cost in costs]
    yield "  training waits at least", [f"{cost.stall:,.2f} s" for cost in costs]
    yield (
        f"  on disk ({request.storage:g} GB/s)",
        [f"after {cost.background:,.0f} s" for cost in costs],
    )
    if config.checkpoints.asynchronous:
        every = [config.checkpoints.every * step.seconds for step in steps]
        yield (
            "  one every",
            [
                f"{each / 60:,.0f} min"
                + (" [red]sooner than it is on disk[/]" if each < cost.background else "")
                for each, cost in zip(every, costs, strict=True)
            ],
        )


def _memory(column: Column, cluster: Cluster) -> str:
    words = f"{column.memory.total / GIGA:,.1f} of {cluster.gpu.memory / GIGA:,.0f} GB"
    return words if column.fits else f"[red]{words}: does not fit[/]"


def _print_details(
    console: Console, found: list[Column], rows: Iterator[tuple[str, list[str]]]
) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column()
    for column in found:
        table.add_column(column.title, justify="right")
    for label, values in rows:
        table.add_row(label, *values)
    console.print(table)


def _print_sweep(
    console: Console, shape: ModelShape, config: TrainingConfig, cluster: Cluster
) -> None:
    """The recipe's batch on 1, 2, 4, ... nodes, as far as it gives every GPU a row."""
    table = Table(
        box=None,
        padding=(0, 2, 0, 0),
        title="the same batch on other numbers of nodes; micro: micro-batches of a step",
        title_justify="left",
    )
    for title in (
        "nodes",
        "GPUs",
        "micro",
        "FSDP tok/s/GPU",
        "GB",
        "HSDP tok/s/GPU",
        "GB",
        "days",
        "faster",
    ):
        table.add_column(title, justify="right")
    nodes = 1
    while nodes * cluster.gpus_per_node <= config.global_batch_size:
        larger = replace(cluster, nodes=nodes)
        try:
            table.add_row(*_sweep_row(shape, Workload.of(config, larger.ranks), larger, config))
        except UserError:
            table.add_row(str(nodes), str(larger.ranks), "-", "batch does not divide")
        nodes *= 2
    console.print(table)


def _sweep_row(
    shape: ModelShape, work: Workload, cluster: Cluster, config: TrainingConfig
) -> list[str]:
    found = columns(shape, work, cluster)
    cells = [str(cluster.nodes), str(cluster.ranks), str(work.micro_batches)]
    for column in found:
        speed = f"{column.step.tokens_per_second_per_device:,.0f}"
        cells += [
            speed if column.fits else f"[red]{speed}[/]",
            f"{column.memory.total / GIGA:,.0f}",
        ]
    cells += ["", ""] * (2 - len(found))
    usable = [column for column in found if column.fits]
    if not usable:
        return [*cells, "-", "[red]neither fits[/]"]
    best = min(usable, key=lambda column: column.step.seconds)
    days = best.step.hours(config.steps * config.tokens_per_step) / DAY
    name = "FSDP" if best.replicas == 1 else "HSDP"
    return [*cells, f"{days:,.2f}", name if len(usable) == len(found) else f"only {name} fits"]


def _crossing(shape: ModelShape, work: Workload, cluster: Cluster) -> str:
    """Where HSDP wins, in words."""
    same = f"With {work.micro_batches} micro-batches of {work.micro_batch_size:g} sequences on every GPU"
    ranges = hsdp_ranges(shape, work, cluster, LIMIT)
    if not ranges:
        return f"{same}, FSDP is the faster one on any number of nodes up to {LIMIT}."
    words = [
        f"from {first} nodes on" if last == LIMIT else f"on {first} to {last} nodes"
        for first, last in ranges
    ]
    return f"{same}, HSDP is the faster one {', '.join(words)}; less than 2 % apart they are alike."
