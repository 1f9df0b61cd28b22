"""The merge of trained shards: all ranks add the chat vector, and no weights are gathered.

Each rank takes its own rows in the type they were trained in (fp32 masters: one rounding), reads
only the same rows of base and chat, and writes only them. The arithmetic is that of the merge from
files, on the CPU, so the bytes are equal; it waits for the disk anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpt_merge.checkpoint.export import (
    LocalShard,
    check_shard,
    writing_together,
)
from cpt_merge.checkpoint.tensor_kinds import embedding_of
from cpt_merge.checkpoint.writer import CheckpointWriter
from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.merge import finish, merge_report, norms
from cpt_merge.merge.config import MergeConfig
from cpt_merge.merge.methods.combine import TensorRange
from cpt_merge.merge.norms import Statistics
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
    """Add the chat vector to the trained shards and write the chat model. Every rank calls it.

    `inputs.cpt` is the resized base that training started from, `inputs.base` the original base
    with its own tokenizer. Returns the results on rank 0 and nothing on the others. Raises
    `UserError` as `merge.plan.plan` and `checkpoint.export.export_shards` do.
    """
    the_plan = plan_for_shards(config, inputs)
    with finish.loading_tokenizer(the_plan) as check:
        check()
    writer = CheckpointWriter(out, the_plan.layout(), ranks.rank)
    shards = _with_tied_head(the_plan, shards)
    own: list[Statistics] = [{} for _ in the_plan.vectors]
    with writing_together(writer, the_plan.cpt, ranks):
        for shard in shards:
            check_shard(shard, writer.layout, inputs.cpt)
        merger = SliceMerger(the_plan, writer, find_ranges(the_plan, shards, ranks))
        for shard in shards:
            tensor = the_plan.by_name[shard.name]
            sums = merger.merge(tensor, shard.start, shard.stop, shard.read)
            norms.add_sums(own, shard.name, sums)
    statistics = norms.total_of_ranks(ranks.gather(own))
    results: dict[str, Any] = {}
    if ranks.is_main:
        results = finish.write_merged(
            the_plan, statistics, writer.directory, merge_report.IN_MEMORY, cpt="start of CPT"
        )
        writer.publish()
        merge_report.warn(results["warnings"])
        merge_report.log(results, out, tracker)
    ranks.barrier()
    return results


def _with_tied_head(the_plan: MergePlan, shards: Sequence[LocalShard]) -> list[LocalShard]:
    """The shards, and those of the embedding as shards of a head that only the output has."""
    head, embedding = the_plan.tied_head, embedding_of(the_plan.cpt)
    copies = [replace(shard, name=head) for shard in shards if head and shard.name == embedding]
    return [*shards, *copies]


def plan_for_shards(config: MergeConfig, inputs: MergeInputs) -> MergePlan:
    """The plan for trained shards. Raises `UserError` also if the output needs untrained rows."""
    if config.method == "slerp":
        raise UserError(
            "slerp looks at whole tensors, of which a training process has a part; set "
            "training.post_train_merge to false, and the merge stage merges the files."
        )
    the_plan = plan(config, inputs)
    for vector in the_plan.vectors:
        check_base(vector.source)
    if the_plan.rows > the_plan.cpt_rows:
        raise UserError(
            f"{inputs.tokenizer_directory} lacks tokens of "
            f"{the_plan.chat.source.chat_directory} and has no row left for them; make the "
            "tokenizer with this chat model, or merge from files after training."
        )
    return the_plan


def find_ranges(
    the_plan: MergePlan, shards: Sequence[LocalShard], ranks: Ranks
) -> dict[str, TensorRange]:
    """What TIES and the gate must know of whole tensors. Every rank calls it.

    The files alone decide the thresholds, whose tensors are divided over the ranks; of a gate's
    range each rank knows the part of its own shards. Then everything is exchanged.
    """
    tensors = the_plan.seen_whole()
    if not tensors:
        return {}
    found = {tensor.name: TensorRange([]) for tensor in tensors}
    for tensor in tensors[ranks.rank :: ranks.size]:
        found[tensor.name].thresholds = thresholds(the_plan, tensor)
    merger = SliceMerger(the_plan, NoOutput(), {})
    for shard in shards:
        if (tensor := the_plan.by_name[shard.name]).gated:
            low, high = merger.gate_range(tensor, shard.start, shard.stop, shard.read)
            here = found[shard.name]
            here.low, here.high = min(here.low, low), max(here.high, high)
    return joined(ranks.gather(as_json(found)))
