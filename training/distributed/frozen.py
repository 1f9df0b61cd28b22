"""Weights that a run with adapters does not train, as exports and previews need them.

Memory holds them in the compute type, and checkpoints of training not at all. Their exact values
are read from the files that training started from, and an adapter's product is added on the way:

    merged = W + scaling * (B[:, 0] A[0] + B[:, 1] A[1] + ...)

The sum is float32 in this order, without fused multiply-add, and is rounded once, when it is
written. So its bits do not depend on processes and devices, and they are those of the same adapter
in peft's format when a merge reads it (checkpoint/adapters.py). No process ever holds more than a
part of one tensor, besides the adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from cpt_merge.checkpoint.derived import DerivedInfo, ReadElements
from cpt_merge.checkpoint.dtypes import Float32, widen
from cpt_merge.checkpoint.export import LocalShard, StoredShard
from cpt_merge.checkpoint.headers import TensorInfo
from cpt_merge.checkpoint.model_names import StoredTensors
from cpt_merge.checkpoint.pieces import RearrangedInfo
from cpt_merge.checkpoint.reader import Checkpoint
from cpt_merge.training.model.build import CausalLM, WeightSource
from cpt_merge.training.phases import PhaseSetup


@dataclass(frozen=True)
class Product:
    """What is added to a weight: scaling * left @ right, (rows, rank) and (rank, width)."""

    left: Tensor
    right: Tensor
    scaling: float
    device: torch.device  # computes it; the matrices are float32 on the CPU

    def rows(self, first: int, last: int) -> Float32:
        """Rows [first, last), one rank after the other."""
        left, right = self.left[first:last].to(self.device), self.right.to(self.device)
        total = torch.zeros(last - first, right.shape[1], device=self.device)
        term = torch.empty_like(total)
        for rank in range(len(right)):
            torch.mul(left[:, rank, None], right[rank], out=term)
            total += term
        total *= torch.tensor(self.scaling, dtype=torch.float32)
        values: Float32 = total.cpu().numpy()
        return values


@dataclass(frozen=True)
class AdaptedInfo(DerivedInfo):
    """A stored weight and the product of its adapter, which is in memory."""

    product: Product = field(compare=False)

    @staticmethod
    def of(base: TensorInfo, product: Product) -> AdaptedInfo:
        """The sum."""
        return AdaptedInfo(
            base.name, "F32", base.shape, base.file, 0, 4 * base.size, base.copied_dtype, (base,),
            product,
        )  # fmt: skip

    def rows(self, read: ReadElements, first: int, last: int) -> Float32:
        """See `DerivedInfo`. Where nothing is added, a weight keeps its bits."""
        added = self.product.rows(first, last)
        stored = read(self.parts[0], first * self.width, last * self.width)
        weight = widen(stored, self.parts[0].dtype).reshape(added.shape)
        return np.where(added == 0, weight, weight + added)


@dataclass(frozen=True)
class FrozenWeights:
    """The frozen weights of a model with what its adapters add to them."""

    names: tuple[str, ...]  # in transformers
    stored: StoredTensors
    files: Checkpoint  # the merged tensors, by the names in transformers and by those of the files

    @staticmethod
    def of(
        module: CausalLM, files: Checkpoint, factor: Callable[[str], Tensor],
        device: torch.device, share: float = 1.0,
    ) -> FrozenWeights:  # fmt: skip
        """Those of `files`, which have the tensors by both names (`StoredTensors.seen_in`).

        `factor` gives a whole matrix of an adapter, by its name in the module. `share` of the
        products is added, which `device` computes.
        """
        products = {}
        for name, adapter in module.adapters.of.items():
            left, right = (factor(one).float().cpu() for one in (adapter.left, adapter.right))
            if adapter.transposed:
                left, right = right.T.contiguous(), left.T.contiguous()
            products[name] = Product(left, right, share * adapter.scaling, device)
        names = tuple(name for name, weight in module.weights() if not weight.requires_grad)
        return FrozenWeights(names, module.stored, _merged(module.stored, files, products))

    def part(self, rank: int, size: int) -> list[LocalShard]:
        """One of `size` equal parts of each tensor of the files."""
        found: list[LocalShard] = []
        for name in sorted(self.stored.stored_names(self.names)):
            shape = self.files.info(name).shape
            count = shape[0] if shape else 1
            rows = -(-count // size)
            start, stop = min(rank * rows, count), min((rank + 1) * rows, count)
            if start < stop:
                values = torch.empty((stop - start, *shape[1:]), device="meta")
                found.append(StoredShard(name, shape, start, values, self.files))
        return found

    def rows(self, name: str, start: int, stop: int) -> LocalShard:
        """Rows of a weight by its name in transformers; only rearranged ones are read at once."""
        if name not in self.stored.rearranged:
            [stored] = self.stored.stored_names([name])
            shape = self.files.info(stored).shape
            values = torch.empty((stop - start, *shape[1:]), device="meta")
            return StoredShard(name, shape, start, values, self.files)
        values = torch.from_numpy(self.files.read_float32(name, start, stop))
        return LocalShard(name, self.files.info(name).shape, start, values)


def open_frozen(module: CausalLM, setup: PhaseSetup) -> Checkpoint | None:
    """The files that hold the frozen weights, for `FrozenWeights.of`; None if memory does."""
    if setup.config.lora is None:
        return None
    return WeightSource.open(module, setup.model, torch.device("cpu")).checkpoint


def _merged(
    stored: StoredTensors, files: Checkpoint, products: Mapping[str, Product]
) -> Checkpoint:
    """The files' tensors, to which the products are added, of weights by their names."""
    tensors = dict(files.tensors)
    for name, product in products.items():
        found = stored.names.get(name, name)
        tensors[found] = AdaptedInfo.of(tensors[found], product)
    changed = {
        id(g): g for g in (stored.groups[name] for name in products if name in stored.rearranged)
    }
    for group in changed.values():
        for name, pieces in group.stored.items():
            tensors[name] = RearrangedInfo.of(name, stored.shapes[name], pieces, tensors)
    return replace(files, tensors=tensors)
