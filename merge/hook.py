"""The carrier in memory: the trained shards become two checkpoints, CPT and CPT + chat vector, written by all ranks.

Each rank takes its own rows, in the type they were trained in (fp32 masters: one rounding), reads only the same rows of
base and chat, and writes only them. Nothing is gathered. The arithmetic is the file carrier's, on the CPU: it waits for
the disk anyway, and so the bytes are equal. Both functions are collective: every rank calls them, also one that holds
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cpt_merge.checkpoint.dtypes import FLOATS, TORCH_NAMES, Float32
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.checkpoint.writer import SHARD_BYTES, CheckpointWriter, Layout, TensorSpec
from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.merge import finish, report, statistics
from cpt_merge.merge.config import Dtype, MergeConfig
from cpt_merge.merge.engine import copy_unmerged
from cpt_merge.merge.plan import MergeInputs, MergePlan, plan
from cpt_merge.merge.ranges import (
    TensorRange,
    as_json,
    joined,
    needs_gate,
    needs_thresholds,
    thresholds,
)
from cpt_merge.merge.rules import model_tensors
from cpt_merge.merge.slices import CHUNK, NoOutput, SliceMerger, rounded
from cpt_merge.merge.statistics import Statistics, Sums
from cpt_merge.merge.vectors import check_base
from cpt_merge.tracking import Tracker


@dataclass(frozen=True)
class LocalShard:
    """Rows [start_row, start_row + len(values)) of a trained tensor of the given global shape; may be empty.

    A tensor that several ranks hold is passed by one of them. A tied head is not passed.
    """

    name: str
    shape: tuple[int, ...]
    start_row: int
    values: torch.Tensor

    @property
    def start(self) -> int:
        """The first element, counted in the whole tensor."""
        return self.start_row * math.prod(self.shape[1:])

    @property
    def stop(self) -> int:
        """One past its last element."""
        return self.start + self.values.numel()

    def read(self, first: int, last: int) -> Float32:
        """Elements [first, last) of the whole tensor, in float32 on the CPU."""
        part = self.values.detach().reshape(-1)[first - self.start : last - self.start]
        values: Float32 = part.to("cpu", torch.float32).numpy()
        return values


def export_shards(
    shards: Iterable[LocalShard],
    like: Path,
    tokenizer: Path,
    out: Path,
    ranks: Ranks,
    dtype: Dtype | None = None,
    shard_size: int = SHARD_BYTES,
) -> None:
    """Write the trained model as a Hugging Face checkpoint.

    `like` is the checkpoint that training started from: names, shapes, types (unless `dtype` is given) and
    configuration are its own. Raises `UserError` if a shard does not fit it, or if a row comes twice or not at all.
    """
    source = Checkpoint.open(like)
    specs = [
        TensorSpec(
            name, TORCH_NAMES[dtype] if dtype and info.dtype in FLOATS else info.dtype, info.shape
        )
        for name, info in model_tensors(source).items()
    ]
    writer = CheckpointWriter(out, Layout.by_size(specs, shard_size), ranks.rank)
    with _writing_together(writer, source, ranks):
        for shard in shards:
            _check(shard, writer.layout, like)
            for first in range(shard.start, shard.stop, CHUNK):
                values = shard.read(first, min(first + CHUNK, shard.stop))
                stored = rounded(values, writer.layout.tensors[shard.name].dtype, shard.name)
                writer.write_flat(shard.name, first, stored)
    if ranks.is_main:
        finish.write_trained(source, writer.layout, tokenizer, writer.directory)
        writer.publish()
    ranks.barrier()


def merge_shards(
    shards: Sequence[LocalShard],
    config: MergeConfig,
    inputs: MergeInputs,
    out: Path,
    tracker: Tracker,
    ranks: Ranks,
) -> dict[str, Any]:
    """Add the chat vector to the trained shards and write the chat model.

    `inputs.cpt` is the resized base that training started from, `inputs.base` the original one with its own tokenizer.
    Returns the results on rank 0 and nothing on the others. Raises `UserError` as `merge.plan.plan` and
    `export_shards` do.
    """
    the_plan = plan_for_shards(config, inputs)
    writer = CheckpointWriter(out, the_plan.layout(), ranks.rank)
    tensors = {tensor.name: tensor for tensor in the_plan.tensors}
    own: list[Statistics] = [{} for _ in the_plan.vectors]
    with _writing_together(writer, the_plan.cpt, ranks):
        for shard in shards:
            _check(shard, writer.layout, inputs.cpt)
        ranges = find_ranges(the_plan, shards, ranks)
        merger = SliceMerger(the_plan, writer, ranges)
        for shard in shards:
            sums = merger.merge(tensors[shard.name], shard.start, shard.stop, shard.read)
            for of_vector, of_shard in zip(own, sums, strict=True):
                of_vector.setdefault(shard.name, Sums())
                of_vector[shard.name] += of_shard
        statistics.save(own, writer.directory, ranks.rank)
    results: dict[str, Any] = {}
    if ranks.is_main:
        collected = statistics.collect(writer.directory, len(the_plan.vectors))
        results = finish.write_merged(
            the_plan, collected, writer.directory, report.IN_MEMORY, cpt="start of CPT"
        )
        writer.publish()
        report.warn(results["warnings"])
        report.log(results, out, tracker)
    ranks.barrier()
    return results


def plan_for_shards(config: MergeConfig, inputs: MergeInputs) -> MergePlan:
    """The plan of a merge in memory. Raises `UserError` also where the output would need rows that were not trained."""
    the_plan = plan(config, inputs)
    for vector in the_plan.vectors:
        check_base(vector.source)
    if the_plan.rows > the_plan.cpt_rows:
        raise UserError(
            f"{inputs.tokenizer} lacks tokens of {the_plan.chat.source.chat_directory} and has no row left for them; "
            "make the tokenizer with this chat model, or merge from files after training."
        )
    return the_plan


def find_ranges(
    the_plan: MergePlan, shards: Sequence[LocalShard], ranks: Ranks
) -> dict[str, TensorRange]:
    """What TIES and the gate must know of whole tensors. The thresholds, which the files decide, are divided over the
    ranks by tensors; of the gate's range each rank knows its own part. Then everything is exchanged.
    """
    tensors = [
        tensor
        for tensor in the_plan.tensors
        if needs_thresholds(the_plan, tensor) or needs_gate(tensor)
    ]
    if not tensors:
        return {}
    found = {tensor.name: TensorRange([]) for tensor in tensors}
    for tensor in tensors[ranks.rank :: ranks.size]:
        found[tensor.name].thresholds = thresholds(the_plan, tensor)
    merger, by_name = (
        SliceMerger(the_plan, NoOutput(), {}),
        {tensor.name: tensor for tensor in tensors},
    )
    for shard in shards:
        if shard.name in by_name and needs_gate(by_name[shard.name]):
            low, high = merger.gate_range(by_name[shard.name], shard.start, shard.stop, shard.read)
            here = found[shard.name]
            here.low, here.high = min(here.low, low), max(here.high, high)
    return joined(ranks.gather(as_json(found)))


@contextmanager
def _writing_together(writer: CheckpointWriter, like: Checkpoint, ranks: Ranks) -> Iterator[None]:
    """Rank 0 prepares, all write within the block; it ends when the data of all ranks is on disk."""
    if ranks.is_main:
        writer.prepare()
    ranks.barrier()
    yield
    if ranks.is_main:  # masks and the like, which nobody trains
        copy_unmerged(
            like,
            writer,
            [name for name, info in writer.layout.tensors.items() if info.dtype not in FLOATS],
        )
    writer.close()
    ranks.barrier()


def _check(shard: LocalShard, layout: Layout, like: Path) -> None:
    info = layout.tensors.get(shard.name)
    if info is None or info.shape != tuple(shard.shape):
        found = f"shape {info.shape}" if info else "no such tensor"
        raise UserError(
            f"the trained {shard.name} has shape {tuple(shard.shape)}, {like} has {found}; "
            "export with the checkpoint that training started from."
        )
