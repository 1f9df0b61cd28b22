"""`cpt-merge plan --gpu`: training time on a cluster that is not here, under FSDP and HSDP.

`cluster/scaling.py` has the model of speed; this module prints its estimates for a recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from cpt_merge.cluster.scaling import (
    GIGA,
    RESERVE,
    STORAGE,
    Cluster,
    StepEstimate,
    Workload,
    checkpoint_cost,
    estimate_step,
    fits,
    fits_gpu,
    hsdp_ranges,
    memory_on,
    on_node,
)
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import counted
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.memory import MemoryEstimate, ModelShape

DAY = 24.0  # hours
MOST_NODES = 256  # up to which HSDP is compared with FSDP
PARTS = "matmul attention elementwise copies optimizer host exposed contention stragglers".split()


@dataclass(frozen=True)
class ClusterOptions:
    """The cluster that the command line describes."""

    gpu: str
    nodes: int = 1
    gpus_per_node: int = 8
    network: float | None = None  # Gbit/s of a node
    storage: float = STORAGE / GIGA  # GB/s of all processes together
    node_memory: float | None = None  # GB of a node itself

    @property
    def cluster(self) -> Cluster:
        """Raises `UserError` for an unknown GPU."""
        return Cluster.of(self.gpu, self.nodes, self.gpus_per_node, self.network, self.node_memory)

    def workload(self, config: TrainingConfig) -> Workload:
        """The work of each GPU. Raises `UserError` for settings that contradict each other."""
        gpu = self.cluster.gpu
        if config.fp8 and not gpu.fp8:
            raise UserError(
                f"training.fp8 is set but {gpu.name} has no float8 matmuls; set it to false."
            )
        return Workload.of(config, self.cluster.ranks)


@dataclass(frozen=True)
class _LayoutCost:
    """The cost of FSDP (one replica) or HSDP (several) on a cluster."""

    replicas: int
    step: StepEstimate
    memory: MemoryEstimate
    fits: bool

    @property
    def name(self) -> str:
        """FSDP or HSDP."""
        return "FSDP" if self.replicas == 1 else "HSDP"


def _layout_costs(shape: ModelShape, work: Workload, cluster: Cluster) -> list[_LayoutCost]:
    """FSDP over all GPUs and, on several nodes, HSDP with one replica per node."""
    found = []
    for replicas in sorted({1, cluster.nodes}):
        step = estimate_step(shape, work, cluster, replicas)
        memory = memory_on(shape, work, cluster, replicas)
        found.append(_LayoutCost(replicas, step, memory, fits(memory, cluster)))
    return found


def show_cluster(
    console: Console, shape: ModelShape, config: TrainingConfig, options: ClusterOptions
) -> None:
    """Print speed, memory and checkpoints on the cluster, and speed on other numbers of nodes."""
    cluster, work = options.cluster, options.workload(config)
    network = f", {cluster.network * 8 / GIGA:,.0f} Gbit/s a node" if cluster.nodes > 1 else ""
    console.print(
        f"\n[bold]estimate[/] for {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}"
        f"{network}: {_batch(work)} on each GPU; docs/scaling.md says how accurate such estimates "
        "are"
        + ("" if cluster.gpu.fitted else f"; no run on {cluster.gpu.name} was compared with them")
    )
    found = _layout_costs(shape, work, cluster)
    costs = [cost for cost in found if cost.replicas == 1 or cost.fits]
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column()
    for cost in costs:
        replicas = f", {cost.replicas} replicas" if cost.replicas > 1 else ""
        table.add_column(cost.name + replicas, justify="right")
    for rows in (
        _speed(costs, config),
        _memory(costs, cluster),
        _checkpoints(costs, shape, config, options),
    ):
        for label, values in rows:
            table.add_row(label, *values)
    console.print(table)
    fitting = _show_other_nodes(console, list(_other_nodes(shape, config, cluster)), config)
    if "HSDP" in fitting and len(costs) == len(found):
        console.print(_where_hsdp_wins(shape, work, cluster), markup=False)


Rows = Iterator[tuple[str, list[str]]]  # a label, and its value for each layout


def _speed(costs: list[_LayoutCost], config: TrainingConfig) -> Rows:
    steps = [cost.step for cost in costs]
    labels = {"exposed": "exposed communication", "host": "to and from the host"}
    for part in PARTS:
        if part == "host" and not any(step.host for step in steps):
            continue
        label = labels.get(part, part)
        yield f"  {label}", [f"{getattr(step, part) * 1000:,.1f} ms" for step in steps]
    yield "one step", [f"{step.seconds:,.3f} s" for step in steps]
    yield "tokens per second", [f"{step.tokens_per_second:,.0f}" for step in steps]
    yield "per GPU", [f"{step.tokens_per_second_per_device:,.0f}" for step in steps]
    yield "MFU", [f"{step.mfu:.1%}" for step in steps]
    yield "exposed communication", [f"{step.exposed_share:.1%}" for step in steps]
    hours = [step.hours(config.steps * config.tokens_per_step) for step in steps]
    yield f"{config.tokens / GIGA:,.2f} G tokens", [f"{each / DAY:,.2f} days" for each in hours]
    yield "", [f"{each * steps[0].ranks:,.0f} GPU-hours" for each in hours]


def _memory(costs: list[_LayoutCost], cluster: Cluster) -> Rows:
    for part in vars(costs[0].memory):
        if part == "on_host" and not any(cost.memory.on_host for cost in costs):
            continue
        values = [f"{getattr(cost.memory, part) / GIGA:,.2f} GB" for cost in costs]
        yield f"  {part.replace('_', ' ')}", values
    memories = [cost.memory for cost in costs]
    yield (
        "memory at once",
        [_part_of(one.total, cluster.gpu.memory, fits_gpu(one, cluster)) for one in memories],
    )
    there = cluster.node_memory
    needed = [on_node(one, cluster) for one in memories]
    yield "memory of a node", [_part_of(size, there, size <= there) for size in needed]


def _part_of(needed: float, there: float, fits: bool) -> str:
    text = f"{needed / GIGA:,.1f} of {there / GIGA:,.0f} GB"
    return text if fits else f"[red]{text}: does not fit[/]"


def _checkpoints(
    costs: list[_LayoutCost], shape: ModelShape, config: TrainingConfig, options: ClusterOptions
) -> Rows:
    cluster, work = options.cluster, options.workload(config)
    saves = [
        checkpoint_cost(shape, work, cluster, cost.replicas, options.storage * GIGA)
        for cost in costs
    ]
    yield "a checkpoint", [f"{save.size / GIGA:,.1f} GB" for save in saves]
    yield "  training waits at least", [f"{save.stall:,.2f} s" for save in saves]
    on_disk = [f"after {save.background:,.0f} s" for save in saves]
    yield f"  on disk ({options.storage:g} GB/s)", on_disk
    if config.checkpoints.asynchronous:
        values = []
        for cost, save in zip(costs, saves, strict=True):
            every = config.checkpoints.every * cost.step.seconds
            warning = " [red]sooner than it is on disk[/]" if every < save.background else ""
            values.append(f"{every / 60:,.0f} min{warning}")
        yield "  one every", values


@dataclass(frozen=True)
class _Row:
    """The recipe's batch on one number of nodes."""

    cluster: Cluster
    micro_batches: int = 0
    costs: tuple[_LayoutCost, ...] = ()  # none if the batch does not divide

    def of(self, layout: str) -> _LayoutCost | None:
        """The cost of FSDP or HSDP."""
        return next((cost for cost in self.costs if cost.name == layout), None)


def _other_nodes(shape: ModelShape, config: TrainingConfig, cluster: Cluster) -> Iterator[_Row]:
    """On 1, 2, 4, ... nodes, as long as every GPU has a sequence."""
    nodes = 1
    while nodes * cluster.gpus_per_node <= config.global_batch_size:
        larger = replace(cluster, nodes=nodes)
        try:
            work = Workload.of(config, larger.ranks)
        except UserError:
            yield _Row(larger)
        else:
            yield _Row(larger, work.micro_batches, tuple(_layout_costs(shape, work, larger)))
        nodes *= 2


def _show_other_nodes(console: Console, rows: list[_Row], config: TrainingConfig) -> set[str]:
    """Print speeds and days of what fits, and how much memory the rest lacks.

    The layouts that fit on some number of nodes.
    """
    costs = [cost for row in rows for cost in row.costs]
    fitting = {cost.name for cost in costs if cost.fits}
    shown = [name for name in ("FSDP", "HSDP") if name in fitting]
    speeds = [title for name in shown for title in (f"{name} tok/s/GPU", "GB")]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in (
        "nodes", "GPUs", "micro", *(speeds or ["FSDP GB"]), *["days", "faster"][: len(shown)],
    ):  # fmt: skip
        table.add_column(title, justify="right")
    for row in rows:
        cells = [str(row.cluster.nodes), str(row.cluster.ranks)]
        if row.costs:
            table.add_row(*cells, str(row.micro_batches), *_cells(row, shown, config))
        else:
            table.add_row(*cells, "-", "batch does not divide")
    console.print("the same batch on other numbers of nodes; micro: micro-batches of a step")
    console.print(table)
    left_out = "FSDP" if not shown else "HSDP" if "HSDP" not in shown else ""
    needed = [cost.memory.total + RESERVE for cost in costs if cost.name == left_out]
    if needed:
        gpu = rows[0].cluster.gpu
        console.print(
            f"{left_out if shown else 'The run'} fits on none of them: a GPU needs at least "
            f"{min(needed) / GIGA:,.1f} GB with what libraries take, and it has "
            f"{gpu.memory / GIGA:,.0f}"
            + ("." if shown else "; --fit names settings that need less."),
            soft_wrap=True,
        )
    return fitting


def _cells(row: _Row, shown: Sequence[str], config: TrainingConfig) -> list[str]:
    """Speed and memory of the layouts shown, days, and of two layouts the faster one."""
    if not shown:
        return [f"[red]{row.costs[0].memory.total / GIGA:,.0f}[/]"]
    cells = []
    for cost in map(row.of, shown):
        if cost is None:  # HSDP on one node is FSDP
            cells += ["", ""]
        else:
            speed = f"{cost.step.tokens_per_second_per_device:,.0f}" if cost.fits else "-"
            memory = f"{cost.memory.total / GIGA:,.0f}"
            cells += [speed, memory if cost.fits else f"[red]{memory}[/]"]
    usable = [cost for cost in row.costs if cost.fits]
    days, best = "-", "[red]neither fits[/]"
    if usable:
        fastest = min(usable, key=lambda cost: cost.step.seconds)
        days = f"{fastest.step.hours(config.steps * config.tokens_per_step) / DAY:,.2f}"
        only = len(usable) < len(row.costs)
        best = f"only {fastest.name} fits" if only else fastest.name
    return [*cells, *[days, best][: len(shown)]]


def _batch(work: Workload) -> str:
    batches, size = counted(work.micro_batches, "micro-batch"), work.micro_batch_size
    return f"{batches} of {counted(int(size) if size == int(size) else size, 'sequence')}"


def _where_hsdp_wins(shape: ModelShape, work: Workload, cluster: Cluster) -> str:
    same = f"With {_batch(work)} on every GPU"
    ranges = hsdp_ranges(shape, work, cluster, MOST_NODES)
    if not ranges:
        return f"{same}, FSDP is faster on any number of nodes up to {MOST_NODES}."
    words = [
        f"from {first} nodes on" if last == MOST_NODES else f"on {first} to {last} nodes"
        for first, last in ranges
    ]
    return f"{same}, HSDP is faster {', '.join(words)}; differences below 2 % do not count."
