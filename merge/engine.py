"""The file carrier: stream three checkpoints through the kernel into a fourth, in memory set by the chunk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from checkpoint.dtypes import Float32, widen
from checkpoint.reader import Checkpoint
from checkpoint.writer import CheckpointWriter
from core.progress import Meter
from merge.plan import MergePlan, PlannedTensor
from merge.slices import SliceMerger
from merge.statistics import Statistics, Sums

BLOCK = 1 << 24  # elements; what one thread does at a time
MAX_THREADS = 4  # more only wait for the disk


@dataclass(frozen=True)
class Block:
    """Elements [start, stop) of a tensor: whole rows where rows matter."""

    tensor: PlannedTensor
    start: int
    stop: int


def blocks(plan: MergePlan) -> Iterator[Block]:
    """All elements of all tensors, in storage order."""
    tensors = plan.layout().tensors
    for tensor in plan.tensors:
        info = tensors[tensor.name]
        step = max(BLOCK // max(info.row_size, 1), 1) * info.row_size if tensor.by_token else BLOCK
        for start in range(0, info.size, step):
            yield Block(tensor, start, min(start + step, info.size))


def merge_files(plan: MergePlan, writer: CheckpointWriter) -> Statistics:
    """Merge everything into a prepared writer. The bytes do not depend on the number of threads."""
    merger, statistics = SliceMerger(plan, writer), Statistics()
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    pool = ThreadPoolExecutor(threads)
    megabytes = sum(tensor.spec.nbytes for tensor in plan.tensors) / 1e6
    try:
        with Meter("merge", megabytes, "MB") as meter:
            for block, sums in pool.map(lambda block: (block, _run(merger, block)), blocks(plan)):
                statistics.setdefault(block.tensor.name, Sums())
                statistics[block.tensor.name] += sums
                share = (block.stop - block.start) / max(writer.layout.tensors[block.tensor.name].size, 1)
                meter.advance(share * block.tensor.spec.nbytes / 1e6)
    finally:
        pool.shutdown(cancel_futures=True)
    return statistics


def _run(merger: SliceMerger, block: Block) -> Sums:
    cpt, name = merger.plan.cpt, block.tensor.name
    if block.tensor.treatment is None:
        merger.writer.write_flat(name, block.start, cpt.read_flat(name, block.start, block.stop))
        return Sums()

    def read_cpt(first: int, last: int) -> Float32:
        return widen(cpt.read_flat(name, first, last), cpt.tensors[name].dtype)

    return merger.merge(block.tensor, block.start, block.stop, read_cpt)


def copy_unmerged(checkpoint: Checkpoint, writer: CheckpointWriter, names: list[str]) -> None:
    """Copy tensors as they are."""
    for name in names:
        writer.write_flat(name, 0, checkpoint.read_flat(name, 0, checkpoint.info(name).size))
