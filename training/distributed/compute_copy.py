"""bf16 compute over fp32 masters on one process: a bf16 copy of the trained model runs.

FSDP2 on a group of one gives the same numbers, but copies each parameter and each gradient several
times per micro-batch. Here a parameter is cast once per step, and a gradient once per micro-batch.
The copy takes 2 bytes per parameter all the time. Where memory is short, use FSDP2 on one process
(recipes/accelerate/fsdp2.yaml); its checkpoints are interchangeable.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from cpt_merge.training.model.build import CausalLM


class ComputeCopy:
    """A bf16 copy of a model, `module`; its gradients are added to the master's in fp32."""

    def __init__(self, master: CausalLM) -> None:
        """Copy the master while its parameters are meta tensors and take no memory."""
        self.master, self.module = master, copy.deepcopy(master)
        self._copies: list[Tensor] = []  # of what is trained
        self._masters: list[Tensor] = []

    def materialise(self, device: torch.device) -> None:
        """Take the weights of the master, which are loaded by now."""
        copies = {
            id(mine): nn.Parameter(mine.detach().bfloat16()) for mine in self.master.parameters()
        }
        state: dict[str, Tensor] = dict(self.master.named_buffers())
        state |= {
            name: copies[id(mine)]
            for name, mine in self.master.named_parameters(remove_duplicate=False)
        }
        self.module.load_state_dict(state, strict=False, assign=True)
        self.module.to(device)
        for mine, theirs in zip(self.master.parameters(), self.module.parameters(), strict=True):
            if mine.requires_grad:
                hand_over = partial(_hand_over, master=mine)
                theirs.register_post_accumulate_grad_hook(hand_over)  # type: ignore[no-untyped-call]
                self._copies.append(theirs.detach())
                self._masters.append(mine.detach())

    def refresh(self) -> None:
        """Take the master's weights again after a step."""
        torch._foreach_copy_(self._copies, self._masters)


def _hand_over(given: Tensor, master: nn.Parameter) -> None:
    gradient = cast(Tensor, given.grad)
    given.grad = None
    if master.grad is None:
        master.grad = gradient.float()
    else:
        master.grad += gradient
