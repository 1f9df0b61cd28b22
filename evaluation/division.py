"""Work divided over processes so that the results do not depend on how many there are.

What is divided is whole batches, formed before: a batch is computed by one process, with the same padding, whichever
process that is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from cpt_merge.core.progress import Meter
from cpt_merge.core.world import World, find_rendezvous, find_world

Item = TypeVar("Item")
Result = TypeVar("Result")

PATIENCE = timedelta(days=1)  # the ranks meet only when the slowest is done


@dataclass(frozen=True)
class Division:
    """This process among those that share the work."""

    world: World
    group: Any = None  # a gloo group; None for one process

    def from_main(self, find: Callable[[], Result]) -> Result:
        """What `find` gives on the first process, for all; the others do not call it."""
        found: list[Any] = [find() if self.world.is_main else None]
        if self.world.size > 1:
            dist.broadcast_object_list(found, src=0, group=self.group)
        result: Result = found[0]
        return result

    def map(
        self, label: str, work: Callable[[Item], Result], items: Sequence[Item]
    ) -> list[Result]:
        """`work(item)` of every item, in the order of the items, on every process. Each is computed by one process."""
        mine = range(self.world.rank, len(items), self.world.size)
        done: dict[int, Result] = {}
        with Meter(label, len(mine), "batches") as meter:
            for place in mine:
                done[place] = work(items[place])
                meter.advance()
        if self.world.size > 1:
            parts: list[Any] = [None] * self.world.size
            dist.all_gather_object(parts, done, group=self.group)
            done = {place: result for part in parts for place, result in part.items()}
        return [done[place] for place in range(len(items))]


@contextmanager
def divided_work() -> Iterator[Division]:
    """Join the other processes of this job; one process alone needs no group."""
    world = find_world()
    if world.size == 1:
        yield Division(world)
        return
    joined = dist.is_initialized()
    if joined:
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
    else:
        meeting = find_rendezvous(world)
        os.environ.update(MASTER_ADDR=meeting.address, MASTER_PORT=str(meeting.port))
        dist.init_process_group("gloo", rank=world.rank, world_size=world.size, timeout=PATIENCE)
        group = dist.group.WORLD
    try:
        yield Division(world, group)
    finally:
        if not joined:
            dist.destroy_process_group()


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places of items of like length, `size` to a batch. The longest come first: what does not fit fails at once."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return [order[start : start + size] for start in range(0, len(order), size)]
