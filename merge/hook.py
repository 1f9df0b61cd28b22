"""The carrier in memory: the trained shards become two checkpoints, CPT and CPT + chat vector, written by all ranks.

Each rank takes its own rows, in the type they were trained in (fp32 masters: one rounding), reads only the same rows of
base and chat, and writes only them. Nothing is gathered. The arithmetic is the file carrier's, on the CPU: it waits for
the disk anyway, and so the bytes are equal. Both functions are collective: every rank calls them, also one that holds
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.export import LocalShard, check_shard, writing_together
from cpt_merge.checkpoint.writer import CheckpointWriter
from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.merge import finish, norms, report
from cpt_merge.merge.config import MergeConfig
from cpt_merge.merge.methods.combine import TensorRange
from cpt_merge.merge.norms import Statistics, Sums
from cpt_merge.merge.plan import MergeInputs, MergePlan, plan
from cpt_merge.merge.slices import NoOutput, SliceMerger, as_json, joined, thresholds
from cpt_merge.merge.vectors import check_base
from cpt_merge.tracking import Tracker


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
    with writing_together(writer, the_plan.cpt, ranks):
        for shard in shards:
            check_shard(shard, writer.layout, inputs.cpt)
        ranges = find_ranges(the_plan, shards, ranks)
        merger = SliceMerger(the_plan, writer, ranges)
        for shard in shards:
            sums = merger.merge(tensors[shard.name], shard.start, shard.stop, shard.read)
            for of_vector, of_shard in zip(own, sums, strict=True):
                of_vector.setdefault(shard.name, Sums())
                of_vector[shard.name] += of_shard
        norms.save(own, writer.directory, ranks.rank)
    results: dict[str, Any] = {}
    if ranks.is_main:
        collected = norms.collect(writer.directory, len(the_plan.vectors))
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
    tensors = the_plan.seen_whole()
    if not tensors:
        return {}
    found = {tensor.name: TensorRange([]) for tensor in tensors}
    for tensor in tensors[ranks.rank :: ranks.size]:
        found[tensor.name].thresholds = thresholds(the_plan, tensor)
    merger = SliceMerger(the_plan, NoOutput(), {})
    gated = {tensor.name: tensor for tensor in tensors if tensor.gated}
    for shard in shards:
        if (of_shard := gated.get(shard.name)) is not None:
            low, high = merger.gate_range(of_shard, shard.start, shard.stop, shard.read)
            here = found[shard.name]
            here.low, here.high = min(here.low, low), max(here.high, high)
    return joined(ranks.gather(as_json(found)))
