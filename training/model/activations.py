"""What autograd keeps of the decoder for the backward pass, in the CPU's memory until then.

With full activation checkpointing these are the inputs of the layers, otherwise all that is kept.
Copies go through pinned memory on the stream that computes: it makes each one before the tensor's
memory is used again, and before the backward pass needs it, so nobody waits and nothing is counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from cpt_merge.core.errors import UserError

SMALL = 1024  # elements; fewer are not worth a copy


@dataclass(frozen=True)
class Moved:
    """A tensor in the CPU's memory, with where and how it was laid out."""

    values: Tensor
    device: torch.device
    stride: tuple[int, ...]

    def back(self) -> Tensor:
        """The tensor as it was; matmuls of another layout would give other bits."""
        here = self.values.to(self.device, non_blocking=True)
        if here.stride() == self.stride:
            return here
        laid_out = torch.empty_strided(
            here.size(), self.stride, dtype=here.dtype, device=self.device
        )
        return laid_out.copy_(here)


class OffloadedActivations:
    """Moves what autograd keeps within `moving`."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.moved = 0
        """Tensors that the last forward pass moved."""

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Around a forward pass. Raises `UserError` if layers keep what is not moved."""
        if not torch.is_grad_enabled():
            yield
            return
        self.moved = 0
        with saved_tensors_hooks(self._pack, _unpack):
            yield
        if self.moved < self.layers:
            raise UserError(
                f"training.offload_activations: of {self.layers} layers only {self.moved} tensors "
                "could be moved to the CPU's memory; set it to false for this model."
            )

    def _pack(self, tensor: Tensor) -> Tensor | Moved:
        if _is_weight(tensor):
            return tensor  # FSDP2 and ZeRO 3 free it, and gather it again
        if tensor.numel() < SMALL or _overlaps(tensor):
            return tensor.detach()  # an output that refers to its own graph would never be freed
        self.moved += 1
        kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return Moved(kept.copy_(tensor, non_blocking=True), tensor.device, tensor.stride())


def _unpack(packed: Tensor | Moved) -> Tensor:
    return packed.back() if isinstance(packed, Moved) else packed


def _is_weight(tensor: Tensor) -> bool:
    """Whether it is a parameter or a view of one, or of a type of its own (float8)."""
    return isinstance(tensor._base, nn.Parameter) or type(tensor) is not Tensor


def _overlaps(tensor: Tensor) -> bool:
    """Whether it was expanded (masks, rotary angles), so that a copy would be larger than it is."""
    return tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
