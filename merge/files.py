"""The merge from files: checkpoints are streamed into a new one, in memory set by the chunk.

The output is divided into blocks, the blocks among the processes, and those of a process among its
threads. The bytes depend on none of that.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cpt_merge.checkpoint.dtypes import Float32, widen
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.core.artifact import fingerprint
from cpt_merge.core.errors import Interrupted, UserError
from cpt_merge.core.progress import Meter, say
from cpt_merge.core.world import find_world
from cpt_merge.merge import ancestry, finish, merge_report
from cpt_merge.merge.config import MergeConfig
from cpt_merge.merge.methods.combine import TensorRange
from cpt_merge.merge.norms import Statistics, Sums
from cpt_merge.merge.plan import MergeInputs, MergePlan, PlannedTensor, check_output, plan
from cpt_merge.merge.rows import describe
from cpt_merge.merge.slices import ReadCpt, SliceMerger, as_json, joined, thresholds
from cpt_merge.merge.vectors import check_base
from cpt_merge.merge.work import BlockSums, Work, staging
from cpt_merge.tracking import Tracker

BLOCK = 1 << 22  # elements; what one thread does at a time
MAX_THREADS = 8  # each needs 5 MB, and more would only wait for the disk
# Changes with the order of the arithmetic or of the blocks: older unfinished merges are of no use
ORDER = "2"
M_ARENA_MAX = -8  # of glibc's malloc.h

T = TypeVar("T")


def merge_directories(
    config: MergeConfig,
    inputs: MergeInputs,
    out: Path,
    tracker: Tracker | None = None,
    check: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Write `cpt + ratio * (chat - base)` to `out` and return the numbers that are worth a summary.

    Called by one process, or by all processes of a launcher, which divide the work; the results are
    returned on rank 0. `out` is missing or empty; what a killed run left next to it is continued.
    `check` is called when the merge is planned, before anything is written; it raises `UserError`.
    Raises `RefusedError` with everything that does not fit, `Interrupted` if a signal stopped the
    merge; the same call continues it.
    """
    world, out = find_world(), out.absolute()
    the_plan = plan(config, inputs)
    the_digest = digest(the_plan)
    if world.is_main:
        staging(out, the_digest).finish_commit()
    finished = merge_report.read_finished(out, the_digest)
    if finished is not None:
        say(f"merge: {out} holds the result of this merge already")
        return finished if world.is_main else {}
    check_output(the_plan, out)
    for vector in the_plan.vectors:
        check_base(vector.source)
    if world.is_main:
        for line in describe(the_plan.changes, the_plan.cpt_rows, the_plan.rows):
            say(f"merge: {line}")
        merge_report.warn(ancestry.warnings(the_plan, ancestry.sample(the_plan)))
    _return_freed_memory()  # of the vocabularies
    if check:
        check()
    work = Work(out, the_plan.layout(), the_digest, world)
    return _merge(the_plan, work, tracker or Tracker())


def _merge(the_plan: MergePlan, work: Work, tracker: Tracker) -> dict[str, Any]:
    """Raises `Interrupted` where the work can be continued, `UserError` where it is of no use."""
    try:
        work.open()
        with finish.loading_tokenizer(the_plan) if work.world.is_main else nullcontext() as check:
            statistics = merge_files(the_plan, work)
            if check:
                check()
        if not work.world.is_main:
            work.close()
            work.wait_for(
                lambda: merge_report.read_finished(work.out, work.digest) is not None,
                "the first process to finish",
            )
            return {}
        _return_freed_memory()
        results = finish.write_merged(the_plan, statistics, work.directory, work.digest)
        work.publish()
    except (KeyboardInterrupt, Interrupted) as stop:
        sentence = f"the merge was stopped; the same command continues it (from {work.directory})."
        work.abandon(sentence)
        raise Interrupted(sentence, getattr(stop, "reason", "SIGINT")) from None
    except UserError as error:
        work.abandon(str(error), useless=True)
        raise
    except BaseException as error:
        work.abandon(f"a process of this merge failed ({error}); the same command continues it.")
        raise
    merge_report.log(results, work.out, tracker)
    return results


def digest(the_plan: MergePlan) -> str:
    """Identifies a merge: its rules, inputs and layout."""
    models = {
        label: " ".join(map(fingerprint, model.directories))
        for label, model in the_plan.models().items()
    }
    headers = [header.hex() for header in the_plan.layout().headers.values()]
    text = json.dumps(
        [ORDER, the_plan.config.model_dump(), models, fingerprint(the_plan.tokenizer), headers],
        sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()[:32]


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
        return (self.stop - self.start) * self.tensor.spec.nbytes // max(self.tensor.size, 1)


def divide(plan: MergePlan) -> list[Block]:
    """All elements of all tensors as blocks, in the order in which they are stored."""
    found: list[Block] = []
    for tensor in plan.tensors:
        size = tensor.size
        width = size // max(tensor.spec.shape[0], 1) if tensor.by_token and tensor.spec.shape else 1
        step = max(BLOCK // max(width, 1), 1) * max(width, 1)
        for start in range(0, size, step):
            found.append(Block(len(found), tensor, start, min(start + step, size)))
    return found


def merge_files(plan: MergePlan, work: Work) -> list[Statistics]:
    """Merge the blocks that are not merged yet.

    Returns the statistics of every vector on the first process, and nothing on the others.
    """
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
    """run(0), run(1), ... in order. Only a few run at once, however many there are."""
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
    """The sums of the blocks, added in their order.

    They do not depend on the number of processes.
    """
    statistics: list[Statistics] = [{} for _ in plan.vectors]
    for block in blocks:
        for of_vector, of_block in zip(statistics, sums[block.number], strict=True):
            of_vector.setdefault(block.tensor.name, Sums())
            of_vector[block.tensor.name] += of_block
    return statistics


def _find_ranges(plan: MergePlan, work: Work) -> dict[str, TensorRange]:
    """What TIES and the gate must know of whole tensors; the processes divide the tensors."""
    tensors = plan.seen_whole()
    if not tensors:
        return {}
    own = tensors[work.world.rank :: work.world.size]
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
    if tensor.gated:
        read = cpt_reader(merger.plan.cpt, tensor.name)
        found.low, found.high = merger.gate_range(tensor, 0, tensor.size, read)
    if merger.plan.config.method == "slerp":
        found.products = merger.products(tensor, cpt_reader(merger.plan.cpt, tensor.name))
    return found


def cpt_reader(cpt: Checkpoint, name: str) -> ReadCpt:
    """Elements [first, last) of a tensor of CPT in float32."""

    def read(first: int, last: int) -> Float32:
        return widen(cpt.read_flat(name, first, last), cpt.tensors[name].dtype)

    return read


def run_block(merger: SliceMerger, pending: list[Block], place: int) -> tuple[Block, BlockSums]:
    """Merge one of the blocks, while the disk fetches what a later block needs."""
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
    """Rows that meet by token are at other places in each model, but mostly close."""
    for block in blocks:
        for model in plan.models().values():
            if block.tensor.name not in model.tensors:
                continue
            size = model.tensors[block.tensor.name].size
            if block.start < size:
                model.expect(block.tensor.name, block.start, min(block.stop, size))


def keep_freed_memory() -> None:
    """Let malloc keep buffers between chunks; otherwise page faults take half of the time.

    This changes settings of the whole process, so only commands that do nothing but merge files
    call it. glibc returns freed memory to the kernel beyond thresholds that grow with the largest
    mapped block that was ever freed, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD): one is freed
    here, untouched. And all threads share one arena (M_ARENA_MAX), because the free memory on top
    of the others is not returned.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)
    np.empty(31 << 20, np.uint8)


def _return_freed_memory() -> None:
    """Let malloc return what is free, before something else needs memory."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
