"""What the processes of a job do together. `core/world.py` says which of them this one is.

Decisions and results are exchanged by collectives of a gloo group (`Ranks`), which never share a
queue with the training. Only where no process group can exist (a merge of files, which runs without
torch; text that is tokenised by independent tasks; the check of a cluster before anything runs) do
processes wait for files (`wait_for`, `publish`).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cpt_merge.core.artifact import write_json
from cpt_merge.core.progress import Meter, say
from cpt_merge.core.torch_compat import memory_store
from cpt_merge.core.world import World, find_rendezvous, find_world

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Item = TypeVar("Item")
Value = TypeVar("Value")

ONE_DAY = timedelta(days=1)
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0  # seconds between two looks at files
QUIET = 30.0  # seconds of waiting until a message says what is waited for


@dataclass(frozen=True)
class Ranks:
    """The processes of a job. Every method is a collective: all of them call it, in the same order.

    `Ranks()` is one process alone. With `stride` n, `map` gives work to every n-th process only:
    the others lend it their GPUs.
    """

    world: World = field(default_factory=World)
    group: ProcessGroup | None = None  # gloo; None for one process alone
    stride: int = 1

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        return self.world.rank

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.world.size

    @property
    def is_main(self) -> bool:
        """True on the one process that prints, logs and writes metadata."""
        return self.world.is_main

    @property
    def works(self) -> bool:
        """Whether `map` may give work to this process."""
        return self.rank % self.stride == 0

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier(group=self.group)

    def any(self, flag: bool) -> bool:
        """True on all processes if it is true on one."""
        return any(self.gather(flag))

    def total(self, value: float) -> float:
        """The sum over all processes, added in the order of the ranks."""
        return sum(self.gather(value))

    def broadcast(self, find: Callable[[], Value]) -> Value:
        """What `find` gives on rank 0, on every process; the others do not call it."""
        if self.size == 1:
            return find()
        import torch.distributed as dist

        found: list[Any] = [find() if self.is_main else None]
        dist.broadcast_object_list(found, src=0, group=self.group)
        value: Value = found[0]
        return value

    def gather(self, value: Value) -> list[Value]:
        """The values of all processes by rank, on every process."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def map(self, label: str, work: Callable[[Item], Value], items: Sequence[Item]) -> list[Value]:
        """`work(item)` for every item, in order, on every process; one process computes each.

        Results do not depend on the number of processes if an item is a whole batch, formed before
        it is divided.
        """
        workers = math.ceil(self.size / self.stride)
        mine = range(self.rank // self.stride, len(items), workers) if self.works else range(0)
        done: dict[int, Value] = {}
        with Meter(label, len(mine), "batches") as meter:
            for place in mine:
                done[place] = work(items[place])
                meter.advance()
        everything = {place: value for part in self.gather(done) for place, value in part.items()}
        return [everything[place] for place in range(len(items))]


def start_process_group(backend: str, timeout: timedelta) -> World:
    """Start torch's default process group with the other processes of this job.

    A process alone becomes a group of one, so that what needs a group has one path. Raises
    `UserError` if the environment does not say where the processes meet.
    """
    import torch.distributed as dist

    world = find_world()
    if world.launcher == "alone":
        dist.init_process_group(
            backend, store=memory_store(), rank=0, world_size=1, timeout=timeout
        )
    else:
        meeting = find_rendezvous(world)
        # torch reads these below, and DeepSpeed later
        os.environ.update(MASTER_ADDR=meeting.address, MASTER_PORT=str(meeting.port))
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=timeout)
    return world


def stop_process_group() -> None:
    """Leave the default process group, if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def joined(timeout: timedelta = ONE_DAY) -> Iterator[Ranks]:
    """The processes of this job, for work that shares results and no weights.

    One process alone needs no group.

    The processes meet only when the slowest is done: hence the long timeout.
    """
    if find_world().size == 1:
        yield Ranks(find_world())
        return
    import torch.distributed as dist

    started_here = not dist.is_initialized()
    if started_here:
        start_process_group("gloo", timeout)
    try:
        yield Ranks(find_world(), dist.new_group(backend="gloo", timeout=timeout))
    finally:
        if started_here:
            stop_process_group()


def wait_for(
    condition: Callable[[], bool],
    what: str,
    *,
    check: Callable[[], None] = lambda: None,
    timeout: float = float("inf"),
) -> bool:
    """Look until `condition` holds, less and less often; whether it does within `timeout` seconds.

    `what` completes the message "waiting for ...", which appears after half a minute. `check` is
    called between two looks and raises if waiting is in vain, because another process has failed.
    """
    started, pause, announced = time.monotonic(), FIRST_PAUSE, False
    while not condition():
        check()
        waited = time.monotonic() - started
        if waited >= timeout:
            return False
        if waited > QUIET and not announced:
            announced = True
            say(f"waiting for {what}")
        time.sleep(min(pause, timeout - waited))
        pause = min(pause * 1.2, LONGEST_PAUSE)
    return True


def publish(directory: Path, name: str, world: World, value: Any) -> None:
    """Write a small value (JSON) for the other processes, which get it by `collect`."""
    write_json(_published(directory, name, world.rank, world.size), value)


def collect(
    directory: Path, name: str, world: World, check: Callable[[], None] = lambda: None
) -> list[Any]:
    """Wait until all processes have published a value; the values by rank.

    `check`: see `wait_for`.
    """
    paths = [_published(directory, name, rank, world.size) for rank in range(world.size)]
    wait_for(
        lambda: all(path.is_file() for path in paths), f"all {world.size} processes", check=check
    )
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _published(directory: Path, name: str, rank: int, size: int) -> Path:
    return directory / f"{name}-{rank:05d}-of-{size:05d}.json"
