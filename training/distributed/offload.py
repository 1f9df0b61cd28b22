"""What backends share that keep the optimizer, or all weights too, in the CPU's memory."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from cpt_merge.training.memory import processes_on_node


def use_cores(environment: Mapping[str, str] = os.environ) -> None:
    """Let the optimizer's step use this process's share of the cores.

    torchrun and accelerate set OMP_NUM_THREADS to 1 where it is not set; another number is kept.
    """
    if torch.get_num_threads() == 1:
        bound = int(environment.get("SLURM_CPUS_PER_TASK", "0"))
        share = len(os.sched_getaffinity(0)) // processes_on_node(environment)
        torch.set_num_threads(max(1, bound or share))


def offloaded(what: str, device: torch.device) -> str:
    """What is in the CPU's memory, for the startup summary."""
    if device.type == "cpu":
        return f"; {what} in the CPU's memory, where everything is on a CPU machine"
    return f"; {what} in the CPU's memory, AdamW on {torch.get_num_threads()} of its threads"
