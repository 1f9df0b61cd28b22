"""The carrier into memory: merged slices go into tensors that are there already, of any type and on any device.

For whoever wants the chat model for a while and not on disk: the ratio sweep, from files, and the preview during
training, from shards. Every element is computed and rounded as for a file, and then converted to the tensor's type, so
that the tensors hold what a loader would have made of the merged checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cpt_merge.checkpoint.dtypes import Array
from cpt_merge.checkpoint.export import LocalShard
from cpt_merge.merge.files import divide, look_at, on_threads, run_block
from cpt_merge.merge.methods.combine import TensorRange
from cpt_merge.merge.plan import MergePlan
from cpt_merge.merge.slices import NoOutput, SliceMerger

VIEWS = {"BF16": torch.bfloat16}  # stored by numpy as another type of the same size


@dataclass(frozen=True)
class Tensors:
    """An output of `SliceMerger`: tensors by their names in the checkpoint, each from its element `first[name]` on."""

    tensors: Mapping[str, Tensor]
    types: Mapping[str, str]  # of the slices, as in a safetensors header
    first: int = 0  # the element of the whole tensor that the tensors begin with

    def write_flat(self, name: str, start: int, values: Array) -> None:
        """See `merge.slices.Output`."""
        merged = torch.from_numpy(values)
        merged = merged.view(VIEWS[self.types[name]]) if self.types[name] in VIEWS else merged
        start -= self.first
        self.tensors[name].view(-1)[start : start + values.size].copy_(merged)


def stored_types(plan: MergePlan) -> dict[str, str]:
    """The types of the merged model's tensors."""
    return {tensor.name: tensor.spec.dtype for tensor in plan.tensors}


def merge_into(
    plan: MergePlan, tensors: Mapping[str, Tensor], ranges: dict[str, TensorRange]
) -> None:
    """Merge from files into contiguous `tensors` without gradients, by the plan's names. `ranges`: see `ranges_of`."""
    merger = SliceMerger(plan, Tensors(tensors, stored_types(plan)), ranges)
    blocks = [block for block in divide(plan) if block.tensor.name in tensors]
    for _ in on_threads(lambda place: run_block(merger, blocks, place), len(blocks)):
        pass


def merge_shard(plan: MergePlan, shard: LocalShard, ranges: dict[str, TensorRange]) -> Tensor:
    """The merged elements of a trained shard, in float32 on the CPU. `ranges`: see `merge.hook.find_ranges`."""
    merged = torch.empty(shard.values.shape, dtype=torch.float32)
    tensor = next(tensor for tensor in plan.tensors if tensor.name == shard.name)
    output = Tensors({shard.name: merged}, {shard.name: tensor.spec.dtype}, shard.start)
    SliceMerger(plan, output, ranges).merge(tensor, shard.start, shard.stop, shard.read)
    return merged


def ranges_of(plan: MergePlan, known: Mapping[str, TensorRange]) -> dict[str, TensorRange]:
    """What TIES and the gate must know of whole tensors, from the files. Ratios do not change what is `known`."""
    new = [tensor for tensor in plan.seen_whole() if tensor.name not in known]
    merger = SliceMerger(plan, NoOutput(), {})
    found = on_threads(lambda number: look_at(merger, new[number]), len(new))
    return {
        **known,
        **{tensor.name: of_tensor for tensor, of_tensor in zip(new, found, strict=True)},
    }
