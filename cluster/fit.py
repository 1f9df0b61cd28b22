"""`cpt-merge plan --gpu NAME --fit`: the fewest settings with which a run fits a GPU's memory.

All combinations of the rungs below are tried, with the estimates of memory and speed that `plan`
prints. Among those that fit, the shortest list wins, and among equally long ones the fastest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from cpt_merge.cluster.plan import ClusterOptions
from cpt_merge.cluster.scaling import (
    GIGA,
    STORAGE,
    Cluster,
    Workload,
    checkpoint_cost,
    estimate_step,
    fits,
    memory_on,
    on_node,
)
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import counted
from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.memory import ModelShape


@dataclass(frozen=True)
class Rung:
    """Settings that save memory together, as overrides of a recipe."""

    overrides: tuple[tuple[str, Any], ...]  # key below `training`, value
    same: bool = True  # whether the run computes the same, up to rounding

    def apply(self, values: dict[str, Any]) -> dict[str, Any]:
        """The training section with these settings."""
        for path, value in self.overrides:
            values = _with(values, path.split("."), value)
        return values


def _with(values: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    first, *rest = path
    inner = _with(values.get(first) or {}, rest, value) if rest else value
    return {**values, first: inner}


@dataclass(frozen=True)
class Fitting:
    """A list of overrides with which a run fits, and what it costs."""

    rungs: tuple[Rung, ...]
    tokens_per_second: float  # with the wait for checkpoints
    memory: float  # bytes of a GPU
    on_node: float  # of a node's own memory

    @property
    def overrides(self) -> list[str]:
        """As they are typed after the recipe."""
        pairs = [pair for rung in self.rungs for pair in rung.overrides]
        return [f"training.{key}={_as_typed(value)}" for key, value in pairs]

    @property
    def same(self) -> bool:
        """Whether the run computes the same, up to rounding."""
        return all(rung.same for rung in self.rungs)


def _as_typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _choices(shape: ModelShape, config: TrainingConfig) -> list[list[Rung]]:
    """The alternatives of each setting that a recipe does not use already."""
    found = []
    if config.micro_batch_size > 1:
        found.append([Rung((("micro_batch_size", 1),))])
    if config.activation_checkpointing != "full":
        kinds = ("selective", "full") if config.activation_checkpointing == "none" else ("full",)
        found.append([Rung((("activation_checkpointing", kind),)) for kind in kinds])
    if config.loss_chunk > 256:
        found.append([Rung((("loss_chunk", 256),))])
    if config.optimizer.moments == "full":
        found.append([Rung((("optimizer.moments", "8bit"),), same=False)])
    if config.precision == "bf16":
        found.append([Rung((("precision", "pure-bf16"),), same=False)])
    if shape.adapters and not config.lora:
        found.append([Rung((("lora.rank", 64),), same=False)])
    if not config.offload:
        found.append([Rung((("offload", "all"),))])
    if not config.offload_activations:
        found.append([Rung((("offload_activations", True),))])
    if config.checkpoints.asynchronous:  # which copies what it saves into the node's memory
        found.append([Rung((("checkpoints.asynchronous", False),))])
    return found


def fittings(
    shape: ModelShape, config: TrainingConfig, cluster: Cluster, storage: float = STORAGE
) -> Iterator[Fitting]:
    """All combinations of rungs with which the run fits, with storage of so many bytes/s."""
    alternatives = [[None, *rungs] for rungs in _choices(shape, config)]
    for chosen in itertools.product(*alternatives):
        rungs = tuple(rung for rung in chosen if rung)
        try:
            changed = _changed(config, rungs)
        except ValueError:  # settings that contradict each other
            continue
        memory = memory_on(shape, Workload.of(changed, cluster.ranks), cluster)
        if fits(memory, cluster):
            speed = _tokens_per_second(shape, changed, cluster, storage)
            yield Fitting(rungs, speed, memory.total, on_node(memory, cluster))


def _changed(config: TrainingConfig, rungs: Iterable[Rung]) -> TrainingConfig:
    """Raises `ValueError` for rungs that do not go together."""
    values = config.model_dump()
    for rung in rungs:
        values = rung.apply(values)
    return TrainingConfig(**values)


def _tokens_per_second(
    shape: ModelShape, config: TrainingConfig, cluster: Cluster, storage: float
) -> float:
    """Over all GPUs, with the time in which training waits for checkpoints."""
    work = Workload.of(config, cluster.ranks)
    step, save = (
        estimate_step(shape, work, cluster),
        checkpoint_cost(shape, work, cluster, 1, storage),
    )
    wait = save.stall if work.asynchronous else save.background
    return step.tokens / (step.seconds + wait / config.checkpoints.every)


def shortest(found: Iterable[Fitting]) -> Fitting | None:
    """The one with the fewest overrides, and among these the fastest."""
    return min(found, key=lambda one: (len(one.overrides), -one.tokens_per_second), default=None)


def show_fit(
    console: Console,
    shape: ModelShape,
    config: TrainingConfig,
    options: ClusterOptions,
    launched: Sequence[str] = (),
) -> None:
    """Print what makes a run fit under FSDP2, for which the recipe needs the overrides `launched`.

    Raises `UserError` if nothing does.
    """
    cluster, storage = options.cluster, options.storage * GIGA
    found = list(fittings(shape, config, cluster, storage))
    best = shortest(found)
    gpus = f"{counted(cluster.ranks, 'GPU')} ({cluster.gpu.name})"
    node = f"nodes with {cluster.node_memory / GIGA:,.0f} GB (--node-memory)"
    if best is None:
        raise UserError(
            f"nothing makes this run fit on {gpus} in {node}; take GPUs or nodes with more memory, "
            "a smaller model or shorter sequences."
        )
    if not (best.rungs or launched):
        console.print(f"It fits on {gpus} in {node} as it is: {_memory_of(best)}.", soft_wrap=True)
        return
    console.print(
        f"\n[bold]with these overrides[/] it fits on {gpus} in {node} under FSDP2:", soft_wrap=True
    )
    fastest = max(found, key=lambda one: one.tokens_per_second)
    same = shortest(one for one in found if one.same)
    unlimited = _tokens_per_second(shape, config, cluster, storage)
    for label, one in {"shortest": best, "fastest": fastest, "computes the same": same}.items():
        if one is not None:
            console.print(
                f"{label}: {_memory_of(one)}; {one.tokens_per_second:,.0f} tokens "
                f"per second, {one.tokens_per_second / unlimited:.0%} of the recipe's on GPUs with "
                "memory enough",
                soft_wrap=True,
            )
            line = " ".join([*launched, *one.overrides])
            console.print(f"    {line}", soft_wrap=True, markup=False)


def _memory_of(fitting: Fitting) -> str:
    on_node = f"{fitting.on_node / GIGA:,.0f} GB of the node's memory"
    return f"{fitting.memory / GIGA:,.1f} GB, and {on_node}"
