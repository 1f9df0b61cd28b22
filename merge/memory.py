"""The merge in memory: merged slices go into existing tensors, of any type and on any device.

For a chat model that is needed for a while and not on disk: the ratio sweep merges from files, the
preview during training from shards, a notebook from a model. Every element is computed and rounded
as for a file and then converted to the tensor's type, so the tensors hold what a loader would make
of the merged checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cpt_merge.checkpoint.dtypes import Array
from cpt_merge.checkpoint.export import LocalShard, check_shard
from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.merge.config import MergeConfig
from cpt_merge.merge.files import divide, look_at, on_threads, run_block
from cpt_merge.merge.hook import find_ranges, plan_for_shards
from cpt_merge.merge.methods.combine import TensorRange
from cpt_merge.merge.plan import MergeInputs, MergePlan
from cpt_merge.merge.slices import NoOutput, SliceMerger

VIEWS = {"BF16": torch.bfloat16}  # numpy holds these as another type of the same size


@dataclass(frozen=True)
class MemoryOutput:
    """An output of `SliceMerger`: tensors by their names in the checkpoint."""

    tensors: Mapping[str, Tensor]
    plan: MergePlan
    first: int = 0  # the element of the whole tensor at which each of the tensors begins

    def write_flat(self, name: str, start: int, values: Array) -> None:
        """See `merge.slices.SliceOutput`."""
        merged = torch.from_numpy(values)
        dtype = self.plan.by_name[name].spec.dtype
        start -= self.first
        target = self.tensors[name].view(-1)[start : start + values.size]
        target.copy_(merged.view(VIEWS[dtype]) if dtype in VIEWS else merged)


def merge_model(model: torch.nn.Module, config: MergeConfig, inputs: MergeInputs) -> MergePlan:
    """Add the chat vector to the weights of a transformers model, in place.

    `inputs.cpt` is the checkpoint that the model was loaded from; its weights may have been trained
    since. Returns the plan: `plan.format` holds the chat template and the ids that end a reply, and
    `merge.finish.write_all_but_weights` writes the tokenizer and the configuration. Raises
    `UserError` if the models do not fit together, or if the output would need rows that the model
    does not have.
    """
    from cpt_merge.checkpoint.model_names import find_stored
    from cpt_merge.checkpoint.stored_shards import replaced_shards, stored_shards

    plan, state = plan_for_shards(config, inputs), model.state_dict()
    check_ties(plan)
    shapes = {name: tensor.spec.shape for name, tensor in plan.by_name.items()}
    found = find_stored(model, shapes, inputs.cpt)
    shards = [
        LocalShard(name, tuple(state[name].shape), 0, state[name])
        for name in (*found.names, *found.rearranged)
    ]
    merged = [
        shard
        for shard in stored_shards(found, shards)
        if plan.by_name[shard.name].treatment is not None
    ]
    for shard in merged:
        check_shard(shard, plan.layout(), inputs.cpt)
    ranges = find_ranges(plan, merged, Ranks())

    def change(shard: LocalShard) -> Tensor:
        treated = plan.by_name[shard.name].treatment is not None
        return merge_shard(plan, shard, ranges) if treated else shard.values

    with torch.no_grad():
        for shard, values in replaced_shards(found, shards, change):
            state[shard.name].copy_(values)
    return plan


def check_ties(plan: MergePlan) -> None:
    """Raise `UserError` if a model in memory is tied and the merged one cannot be."""
    if plan.tied_head:
        raise UserError(
            f"the head of {plan.cpt.directory} is its embedding, but base or chat has a head of "
            "its own, so the merged model needs one; merge from files."
        )


def merge_into(
    plan: MergePlan, tensors: Mapping[str, Tensor], ranges: dict[str, TensorRange]
) -> None:
    """Merge from files into contiguous `tensors` without gradients, by the plan's names.

    `ranges`: see `ranges_of`.
    """
    merger = SliceMerger(plan, MemoryOutput(tensors, plan), ranges)
    blocks = [block for block in divide(plan) if block.tensor.name in tensors]
    for _ in on_threads(lambda place: run_block(merger, blocks, place), len(blocks)):
        pass


def merge_shard(plan: MergePlan, shard: LocalShard, ranges: dict[str, TensorRange]) -> Tensor:
    """The merged elements of a trained shard, in float32 on the CPU; see `find_ranges`."""
    merged = torch.empty(shard.values.shape, dtype=torch.float32)
    merger = SliceMerger(plan, MemoryOutput({shard.name: merged}, plan, shard.start), ranges)
    merger.merge(plan.by_name[shard.name], shard.start, shard.stop, shard.read)
    return merged


def ranges_of(plan: MergePlan, known: Mapping[str, TensorRange]) -> dict[str, TensorRange]:
    """What TIES and the gate must know of whole tensors, from the files; `known` ranges are kept.

    Ratios do not change ranges.
    """
    new = [tensor for tensor in plan.seen_whole() if tensor.name not in known]
    merger = SliceMerger(plan, NoOutput(), {})
    found = on_threads(lambda number: look_at(merger, new[number]), len(new))
    return {**known, **dict(zip((tensor.name for tensor in new), found, strict=True))}
