"""Frozen weights that bf16 would round: in fp32 in the CPU's memory, each process some rows.

A phase must not change what it does not train, and an fp32 base and what the phase before trained
have more digits than bf16. FSDP2 holds all weights in fp32; DeepSpeed has masters only of what it
trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from cpt_merge.training.distributed.parallel import Parallel
from cpt_merge.training.model.build import full_shape


@dataclass(frozen=True)
class ExactRows:
    """The rows of this process, by weight; of weights that bf16 holds exactly there are none."""

    parallel: Parallel
    _kept: dict[Tensor, Tensor] = field(default_factory=dict)

    def of(self, weight: Tensor) -> Tensor | None:
        """This process's rows of a weight (`divided_rows`), if they are kept."""
        return self._kept.get(weight)

    def keep(self, weight: Tensor, rows: Tensor) -> None:
        """Keep rows only of a weight that bf16 would round on some process; a collective."""
        rows = rows.float()
        self._kept[weight] = rows
        if not self.parallel.any(not torch.equal(rows, rows.bfloat16().float())):
            del self._kept[weight]

    def make_room(self, weights: Iterable[Tensor]) -> None:
        """Have rows of all these weights, to be read into; `keep` then says which are needed."""
        for weight in weights:
            shape = full_shape(weight)
            start, stop = divided_rows(shape, self.parallel)
            self._kept[weight] = torch.zeros(stop - start, *shape[1:])


def divided_rows(shape: Sequence[int], parallel: Parallel) -> tuple[int, int]:
    """Which rows [start, stop) of a tensor this process has."""
    rows = -(-shape[0] // parallel.size)
    first = parallel.rank * rows
    return min(first, shape[0]), min(first + rows, shape[0])


def joined_rows(rows: Tensor, shape: Sequence[int], parallel: Parallel) -> Tensor:
    """All rows of a tensor, gathered from the processes as `divided_rows` says."""
    padded = torch.zeros((-(-shape[0] // parallel.size), *shape[1:]), dtype=rows.dtype)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(parallel.size)]
    dist.all_gather(parts, padded, group=parallel.group)
    return torch.cat(parts)[: shape[0]]
