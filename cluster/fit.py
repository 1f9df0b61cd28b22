"""`cpt-merge plan --gpu NAME --fit`: the fewest settings with which a run fits a GPU's memory.

All combinations of the rungs below are tried, with the estimates of memory and speed that `plan`
prints. Among those that fit, the shortest list wins, and among equally long ones the fastest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from cpt_merge.cluster.scaling import (
    GIGA,
    Cluster,
    Workload,
    estimate_step,
    fits,
    memory_on,
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
    tokens_per_second: float
    memory: float  # bytes of a GPU
    on_host: float  # of the CPU's memory, for a GPU

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


def _choices(config: TrainingConfig) -> list[list[Rung]]:
    """The alternatives of each setting that a recipe does not use already."""
    found = []
    if config.micro_batch_size > 1:
        found.append([Rung((("micro_batch_size", 1),))])
    if config.activation_checkpointing != "full":
        alone = config.activation_checkpointing == "selective" or config.offload_activations
        kinds = ("full",) if alone else ("selective", "full")
        found.append([Rung((("activation_checkpointing", kind),)) for kind in kinds])
    if config.loss_chunk > 256:
        found.append([Rung((("loss_chunk", 256),))])
    if config.optimizer.moments == "full":
        found.append([Rung((("optimizer.moments", "8bit"),), same=False)])
    if config.precision == "bf16":
        found.append([Rung((("precision", "pure-bf16"),), same=False)])
    if not config.lora:
        found.append([Rung((("lora.rank", 64),), same=False)])
    if not config.offload:
        found.append([Rung((("offload", "all"),))])
    return found


def fittings(
    shape: ModelShape, config: TrainingConfig, cluster: Cluster, replicas: int = 1
) -> Iterator[Fitting]:
    """All combinations of rungs with which the run fits."""
    alternatives = [[None, *rungs] for rungs in _choices(config)]
    for chosen in itertools.product(*alternatives):
        rungs = tuple(rung for rung in chosen if rung)
        changed = _changed(config, rungs)
        work = Workload.of(changed, cluster.ranks)
        memory = memory_on(shape, work, cluster, replicas)
        if fits(memory, cluster.gpu):
            speed = estimate_step(shape, work, cluster, replicas).tokens_per_second
            yield Fitting(rungs, speed, memory.total, memory.on_host)


def _changed(config: TrainingConfig, rungs: Iterable[Rung]) -> TrainingConfig:
    values = config.model_dump()
    for rung in rungs:
        values = rung.apply(values)
    return TrainingConfig(**values)


def shortest(found: Iterable[Fitting]) -> Fitting | None:
    """The one with the fewest overrides, and among these the fastest."""
    return min(found, key=lambda one: (len(one.overrides), -one.tokens_per_second), default=None)


def show_fit(console: Console, shape: ModelShape, config: TrainingConfig, cluster: Cluster) -> None:
    """Print what makes a run fit. Raises `UserError` if nothing does."""
    found = list(fittings(shape, config, cluster))
    best = shortest(found)
    gpus = f"{counted(cluster.ranks, 'GPU')} ({cluster.gpu.name})"
    if best is None:
        raise UserError(
            f"nothing makes this run fit on {gpus}; take GPUs with more memory, a smaller model or "
            "shorter sequences."
        )
    if not best.rungs:
        console.print(f"It fits on {gpus} as it is: {best.memory / GIGA:,.1f} GB.")
        return
    fastest = max(found, key=lambda one: one.tokens_per_second)
    same = shortest(one for one in found if one.same)
    unlimited = _unlimited(shape, config, cluster)
    console.print(f"\n[bold]with these overrides[/] it fits on {gpus} under FSDP2:")
    rows = {"shortest": best, "fastest": fastest, "computes the same": same}
    for label, one in rows.items():
        if one is not None:
            in_node = one.on_host * cluster.gpus_per_node
            host = f", and {in_node / GIGA:,.0f} GB of the node's memory" if in_node else ""
            console.print(
                f"{label}: {one.memory / GIGA:,.1f} GB{host}; {one.tokens_per_second:,.0f} tokens "
                f"per second, {one.tokens_per_second / unlimited:.0%} of the recipe's on GPUs with "
                "memory enough",
                soft_wrap=True,
            )
            launched = ["launch.accelerate_config=fsdp2", *one.overrides]
            console.print(f"    {' '.join(launched)}", soft_wrap=True, markup=False)


def _unlimited(shape: ModelShape, config: TrainingConfig, cluster: Cluster) -> float:
    """Tokens per second of the recipe as it is, if memory were no limit."""
    work = Workload.of(config, cluster.ranks)
    return estimate_step(shape, work, cluster).tokens_per_second
