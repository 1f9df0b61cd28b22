"""Which GPUs hold a copy of a model under evaluation.

A model that one GPU holds is copied to every process's GPU, and the processes divide the work.
Layers of a larger one are spread over several GPUs of a node; the processes that lend theirs to a
neighbour get no work meanwhile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cpt_merge.checkpoint.reader import stored_tensors
from cpt_merge.core.distributed import Ranks
from cpt_merge.core.errors import UserError
from cpt_merge.core.progress import say

BESIDE_WEIGHTS = 1.25  # memory for activations and caches, as a multiple of the weights'


@dataclass(frozen=True)
class Gpus:
    """`count` GPUs of this node from number `first` on. A count of 0 is the CPU."""

    first: int = 0
    count: int = 0

    @staticmethod
    def one(local_rank: int) -> Gpus:
        """The GPU of a process, or the CPU where there are none."""
        return Gpus(local_rank, 1) if torch.cuda.is_available() else CPU

    def placement(self) -> dict[str, Any]:
        """The arguments of `from_pretrained`. Several GPUs get as many layers each as fit."""
        if self.count == 0:
            return {}
        if self.count == 1:
            return {"device_map": f"cuda:{self.first}"}
        memory = {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in self.numbers}
        return {"device_map": "balanced", "max_memory": memory}

    @property
    def numbers(self) -> range:
        """The GPUs as this process numbers them."""
        return range(self.first, self.first + self.count)


CPU = Gpus()


def divide_gpus(directory: Path, wanted: int | None, ranks: Ranks) -> tuple[Gpus, Ranks]:
    """The GPUs of this process's copy of a model, and the processes with those that have one.

    All processes call this. `wanted` is how many GPUs a copy gets, None as few as hold it. Raises
    `UserError` if the node has too few.
    """
    if not torch.cuda.is_available():
        if wanted is not None and wanted > 1:
            say(f"evaluation.gpus_per_model = {wanted} has no effect: there are no GPUs here")
        return CPU, ranks
    there = torch.cuda.device_count()
    on_node = ranks.size // max(ranks.gather(ranks.world.local_rank).count(0), 1)
    memory = torch.cuda.get_device_properties(0).total_memory
    count = wanted or gpus_needed(weights_bytes(directory), memory, there)
    stride = copies_apart(count, there, on_node)
    if wanted is None and count > 1:
        say(f"{directory}: its weights need {count} GPUs; every copy is spread over as many")
    return Gpus(ranks.world.local_rank // stride * count, count), replace(ranks, stride=stride)


def weights_bytes(directory: Path) -> int:
    """Bytes of a model's weights in bfloat16; those of a quantised one as they are stored."""
    tensors = stored_tensors(directory).values()
    return sum(min(one.nbytes, 2 * one.size) for one in tensors)


def gpus_needed(weights: int, memory: int, there: int) -> int:
    """How many of a node's `there` GPUs with `memory` bytes each hold `weights` bytes.

    Their number divides the node's, so that every GPU belongs to a copy. Raises `UserError` if they
    are too few.
    """
    needed = max(1, math.ceil(weights * BESIDE_WEIGHTS / memory))
    if needed > there:
        raise UserError(
            f"the model's weights of {weights / 1e9:.0f} GB need {needed} GPUs of "
            f"{memory / 1e9:.0f} GB, and there are {there} here; evaluate it on a larger node, or "
            "let a server answer for it by evaluation.engine."
        )
    return next(count for count in range(needed, there + 1) if there % count == 0)


def copies_apart(count: int, there: int, on_node: int) -> int:
    """Every how many-th of the `on_node` processes has a copy, if one takes `count` GPUs.

    Raises `UserError` if the node's `there` GPUs or its processes cannot be divided so.
    """
    if count > there:
        raise UserError(
            f"evaluation.gpus_per_model = {count}, and there are {there} GPUs here; lower it."
        )
    stride = max(1, math.ceil(count * on_node / there)) if count > 1 else 1
    if on_node % stride:
        raise UserError(
            f"evaluation.gpus_per_model = {count} does not divide the {on_node} processes of a "
            "node; set a number that does."
        )
    return stride
