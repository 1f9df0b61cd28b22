"""AdamW in groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpt_merge.training.compact_adamw import CompactAdamW
from cpt_merge.training.config import MOMENT_BLOCK, TrainingConfig
from cpt_merge.training.model.build import CausalLM, full_shape
from cpt_merge.training.phases import Phase, vocabulary_matrices
from cpt_merge.training.shield import shielded

AdamW = torch.optim.AdamW | CompactAdamW


def build_optimizer(module: CausalLM, training: TrainingConfig, phase: Phase) -> AdamW:
    """AdamW over the weights that the phase trains.

    Matrices decay, norms and biases do not. Embedding and head have their own rate; they do not
    decay while some of their rows are frozen, nor do linear layers some of whose columns are.

    Every group keeps its peak rate under `peak`, and under `part` what it holds: layers or
    vocabulary.
    """
    config = training.optimizer
    members: dict[tuple[str, float], list[torch.nn.Parameter]] = {}
    vocabulary = {id(parameter) for parameter in vocabulary_matrices(module)}
    partly = shielded(module).values() if training.shield else ()
    undecayed = {id(part.weight) for part in partly}
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        part = "vocabulary" if id(parameter) in vocabulary else "layers"
        decay = (
            config.weight_decay
            if len(full_shape(parameter)) > 1
            and not module.frozen_rows
            and id(parameter) not in undecayed
            else 0.0
        )
        members.setdefault((part, decay), []).append(parameter)
    rates = {"vocabulary": phase.embedding_learning_rate, "layers": phase.learning_rate}
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr": rates[part], "peak": rates[part], "part": part,
         "weight_decay": decay}
        for (part, decay), parameters in members.items()
    ]  # fmt: skip
    betas, eight_bits = (config.beta1, config.beta2), config.moments == "8bit"
    if not eight_bits and training.precision != "pure-bf16":
        return torch.optim.AdamW(groups, betas=betas, eps=config.epsilon, fused=True)
    return CompactAdamW(
        groups, betas=betas, eps=config.epsilon, eight_bits=eight_bits,
        seed=training.seed,
    )  # fmt: skip


def complete_state(optimizer: AdamW) -> None:
    """Give trained weights without a gradient so far the state with which AdamW begins.

    AdamW makes it at the first gradient, which weights that take no part in the loss (Zamba2's
    unused adapters) never get, and a checkpoint is read for all of them. An empty state stays
    empty: torch fills it when it reads one.
    """
    for group in optimizer.param_groups if optimizer.state else ():
        for parameter in group["params"]:
            if not optimizer.state.get(parameter):
                optimizer.state[parameter] = fresh_state(optimizer, parameter)


def fresh_state(optimizer: AdamW, parameter: Tensor) -> dict[str, Tensor]:
    """The state with which AdamW begins."""
    if isinstance(optimizer, CompactAdamW):
        return optimizer.fresh_state(parameter)
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def bytes_of_moments(optimizer: torch.optim.Optimizer, values: int, size: int) -> int:
    """Bytes of both moments of a weight of so many values, whose masters have `size` bytes each."""
    if isinstance(optimizer, CompactAdamW) and optimizer.eight_bits:
        return round(2 * values * (1 + 4 / MOMENT_BLOCK))
    return 2 * values * size


def describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """A line of the startup summary, if weights or moments are smaller than usual."""
    return {"optimizer": optimizer.describe()} if isinstance(optimizer, CompactAdamW) else {}


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rates as they are now, by the names that they are logged under."""
    names = {"layers": "train/learning_rate", "vocabulary": "train/learning_rate_vocabulary"}
    return {names[group["part"]]: float(group["lr"]) for group in optimizer.param_groups}


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate becomes `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
