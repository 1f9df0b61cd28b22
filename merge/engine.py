"""The file carrier: stream checkpoints through the kernel into a new one, in memory set by the chunk.

The output is divided into blocks, the blocks over the processes, and each process's over its threads. The bytes depend
on none of that.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from cpt_merge.checkpoint.dtypes import Float32, widen
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.progress import Meter
from cpt_merge.merge.journal import BlockSums
from cpt_merge.merge.plan import MergePlan, PlannedTensor, elements
from cpt_merge.merge.ranges import (
    TensorRange,
    as_json,
    joined,
    needs_gate,
    needs_thresholds,
    thresholds,
)
from cpt_merge.merge.slices import ReadCpt, SliceMerger
from cpt_merge.merge.statistics import Statistics, Sums
from cpt_merge.merge.work import Work

BLOCK = 1 << 22  # elements; what one thread does at a time
MAX_THREADS = 4  # more only wait for the disk

T = TypeVar("T")


@dataclass(frozen=True)
class Block:
    """Elements [start, stop) of a tensor: whole rows where rows matter."""

    number: int
    tensor: PlannedTensor
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the output."""
        return (self.stop - self.start) * self.tensor.spec.nbytes // max(elements(self.tensor), 1)


def divide(plan: MergePlan) -> list[Block]:
    """All elements of all tensors, in the order in which they are stored."""
    found: list[Block] = []
    for tensor in plan.tensors:
        size = elements(tensor)
        width = size // max(tensor.spec.shape[0], 1) if tensor.by_token and tensor.spec.shape else 1
        step = max(BLOCK // max(width, 1), 1) * max(width, 1)
        for start in range(0, size, step):
            found.append(Block(len(found), tensor, start, min(start + step, size)))
    return found


def merge_files(plan: MergePlan, work: Work) -> list[Statistics]:
    """Merge what is not merged yet. Returns every vector's statistics on the first process, nothing on the others."""
    blocks, world = divide(plan), work.world
    done = work.finished_blocks()
    own = [block for block in blocks if block.number % world.size == world.rank]
    merger = SliceMerger(plan, work.files, _find_ranges(plan, work))
    megabytes = sum(block.nbytes for block in own) / 1e6
    before = sum(block.nbytes for block in own if block.number in done) / 1e6
    pending = [block for block in own if block.number not in done]
    with Meter("merge", megabytes, "MB", before) as meter:
        for block, sums in on_threads(
            lambda place: run_block(merger, pending, place), len(pending)
        ):
            work.journal.note(block.number, sums, block.nbytes)
            meter.advance(block.nbytes / 1e6)
    work.journal.start_sync()
    if not world.is_main:
        work.journal.finish_sync()
        return []
    work.wait_for(lambda: len(work.finished_blocks()) == len(blocks), "the other processes")
    return _summed(plan, blocks, work.finished_blocks())


def on_threads(run: Callable[[int], T], count: int) -> Iterator[T]:
    """run(0), run(1), ... in order; few are under way at once, however many there are."""
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[T]] = deque()
        try:
            for number in range(count):
                running.append(pool.submit(run, number))
                if len(running) > 2 * threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def _summed(plan: MergePlan, blocks: list[Block], sums: dict[int, BlockSums]) -> list[Statistics]:
    """Added in the order of the blocks, so that the division of the work does not show."""
    statistics: list[Statistics] = [{} for _ in plan.vectors]
    for block in blocks:
        for of_vector, of_block in zip(statistics, sums[block.number], strict=True):
            of_vector.setdefault(block.tensor.name, Sums())
            of_vector[block.tensor.name] += of_block
    return statistics


def _find_ranges(plan: MergePlan, work: Work) -> dict[str, TensorRange]:
    """What TIES and the gate must know of whole tensors: each process looks at some, all get everything."""
    tensors = [
        tensor for tensor in plan.tensors if needs_thresholds(plan, tensor) or needs_gate(tensor)
    ]
    if not tensors:
        return {}
    own = [
        tensor
        for number, tensor in enumerate(tensors)
        if number % work.world.size == work.world.rank
    ]
    merger, found = SliceMerger(plan, work.files, {}), dict[str, TensorRange]()

    with Meter("merge: looking at whole tensors", len(own), "tensors") as meter:
        looked = on_threads(lambda number: look_at(merger, own[number]), len(own))
        for tensor, of_tensor in zip(own, looked, strict=True):
            found[tensor.name] = of_tensor
            meter.advance()
    return joined(work.share("ranges", as_json(found)))


def look_at(merger: SliceMerger, tensor: PlannedTensor) -> TensorRange:
    """What must be known of a whole tensor, from the files."""
    found = TensorRange(thresholds(merger.plan, tensor))
    if needs_gate(tensor):
        read = cpt_reader(merger.plan.cpt, tensor.name)
        found.low, found.high = merger.gate_range(tensor, 0, elements(tensor), read)
    return found


def cpt_reader(cpt: Checkpoint, name: str) -> ReadCpt:
    """Elements [first, last) of a tensor of CPT in float32."""

    def read(first: int, last: int) -> Float32:
        return widen(cpt.read_flat(name, first, last), cpt.tensors[name].dtype)

    return read


def run_block(merger: SliceMerger, pending: list[Block], place: int) -> tuple[Block, BlockSums]:
    """Merge one of the blocks, while the disk fetches what is needed a little later."""
    plan, block = merger.plan, pending[place]
    _read_ahead(plan, pending[place + MAX_THREADS : place + MAX_THREADS + 1])
    name = block.tensor.name
    if block.tensor.treatment is None:
        merger.output.write_flat(
            name, block.start, plan.cpt.read_flat(name, block.start, block.stop)
        )
        return block, [Sums() for _ in plan.vectors]
    return block, merger.merge(block.tensor, block.start, block.stop, cpt_reader(plan.cpt, name))


def _read_ahead(plan: MergePlan, blocks: list[Block]) -> None:
    """Rows that meet by token lie at other places in each model, but mostly near."""
    for block in blocks:
        for model in plan.models().values():
            size = model.tensors[block.tensor.name].size
            if block.start < size:
                model.expect(block.tensor.name, block.start, min(block.stop, size))
