"""Source-shielded updates: columns of weights that the source language needs are not trained.

Yamaguchi et al., Mitigating Catastrophic Forgetting in Target Language Adaptation of LLMs via
Source-Shielded Updates, 2025, https://arxiv.org/abs/2512.04844. For a linear layer y = W x with
inputs x_t of tokens t of the source language, column j (what reads input j) has the importance

    importance_j = (mean over i of |W_ij|) * sqrt(sum over t of x_tj^2)

that of Wanda (Sun et al., 2023) by column. The share of columns with the largest importance gets a
gradient of zero, so Adam's moments stay zero there and its update is 0 / (0 + epsilon); matrices
with frozen columns do not decay. Embedding, head, norms and biases are trained, and so are experts
that a family keeps in one tensor, which are no linear layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cpt_merge.core.artifact import write_arrays
from cpt_merge.training.model.build import CausalLM


@dataclass(frozen=True)
class Shield:
    """The frozen columns of each weight (bool [inputs]), by the parameter's name in `CausalLM`."""

    frozen: Mapping[str, Tensor]

    @staticmethod
    def of(importance: Mapping[str, Tensor], share: float) -> Shield:
        """Freeze this share of the columns of each weight, those with the largest importance."""
        frozen = {}
        for name, values in importance.items():
            mask = torch.zeros_like(values, dtype=torch.bool)
            mask[values.topk(round(share * len(values))).indices] = True
            frozen[name] = mask
        return Shield(frozen)

    @staticmethod
    def read(path: Path) -> Shield:
        """What `write` wrote."""
        with np.load(path) as kept:
            return Shield({name: torch.from_numpy(kept[name]) for name in kept.files})

    def write(self, path: Path) -> None:
        """Write it, complete or not at all."""
        write_arrays(path, {name: mask.cpu().numpy() for name, mask in self.frozen.items()})

    def to(self, device: torch.device) -> Shield:
        """The same on a device."""
        return Shield({name: mask.to(device) for name, mask in self.frozen.items()})

    def clear_gradients(self, module: nn.Module) -> None:
        """Zero gradients in the frozen columns. Shards hold whole rows, so also whole columns."""
        for name, parameter in module.named_parameters():
            mask = self.frozen.get(name)
            if mask is not None and parameter.grad is not None:
                gradient = parameter.grad
                local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                local[:, mask.to(local.device)] = 0


def shielded(module: CausalLM) -> dict[str, nn.Linear]:
    """The linear layers of the decoder that are trained, by the names of their weights."""
    within = {id(part) for part in module.layers.modules()}
    return {
        f"{name}.weight": part
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and id(part) in within and part.weight.requires_grad
    }


@contextmanager
def squares_of_inputs(module: CausalLM) -> Iterator[dict[str, Tensor]]:
    """Within the block, add up the squares of what each shielded layer reads, by input."""
    found: dict[str, Tensor] = {}

    def add(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares = inputs[0].detach().float().flatten(0, -2).square().sum(0)
        found[name] = found[name] + squares if name in found else squares

    handles = [
        part.register_forward_pre_hook(partial(add, name))
        for name, part in shielded(module).items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def importance(module: CausalLM, squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The importance of every column of every shielded weight, the same on all processes.

    A collective. `squares` are sums over this process's tokens.
    """
    found = {}
    for name, part in shielded(module).items():
        weight = part.weight
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        sizes = local.detach().abs().float().sum(0)
        if isinstance(weight, DTensor):
            dist.all_reduce(sizes, group=weight.device_mesh.get_group(weight.device_mesh.ndim - 1))
        # a layer that no token reached (of an expert) has none
        total = squares.get(name, torch.zeros_like(sizes)).to(sizes.device)
        dist.all_reduce(total)
        found[name] = sizes / weight.shape[0] * total.sqrt()
    return found


def frozen_share(shield: Shield, module: nn.Module) -> float:
    """The share of the module's parameters that the shield freezes."""
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    columns = {name: int(mask.sum()) / len(mask) for name, mask in shield.frozen.items()}
    return sum(share * sizes[name] for name, share in columns.items()) / sum(sizes.values())
