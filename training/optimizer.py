"""AdamW in groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch

from cpt_merge.training.config import OptimizerConfig, ScheduleConfig
from cpt_merge.training.model.build import CausalLM, full_shape
from cpt_merge.training.phases import Phase, vocabulary_matrices


def build_optimizer(module: CausalLM, config: OptimizerConfig, phase: Phase) -> torch.optim.AdamW:
    """AdamW over the weights that the phase trains.

    Matrices decay, norms and biases do not. Embedding and head have their own rate; they do not
    decay while some of their rows are frozen.

    Every group keeps its peak rate under `peak`, and under `part` what it holds: layers or
    vocabulary.
    """
    groups: dict[tuple[str, float], list[torch.nn.Parameter]] = {}
    vocabulary = {id(parameter) for parameter in vocabulary_matrices(module)}
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        part = "vocabulary" if id(parameter) in vocabulary else "layers"
        decay = (
            config.weight_decay
            if len(full_shape(parameter)) > 1 and not module.frozen_rows
            else 0.0
        )
        groups.setdefault((part, decay), []).append(parameter)
    rates = {"vocabulary": phase.embedding_learning_rate, "layers": phase.learning_rate}
    return torch.optim.AdamW(
        [
            {"params": members, "lr": rates[part], "peak": rates[part], "part": part,
             "weight_decay": decay}
            for (part, decay), members in groups.items()
        ],
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )  # fmt: skip


def complete_state(optimizer: torch.optim.AdamW) -> None:
    """Give trained weights without a gradient so far the state with which AdamW begins.

    AdamW makes it at the first gradient, which weights that take no part in the loss (Zamba2's
    unused adapters) never get, and a checkpoint is read for all of them. An empty state stays
    empty: torch fills it when it reads one.
    """
    for group in optimizer.param_groups if optimizer.state else ():
        for parameter in group["params"]:
            if not optimizer.state.get(parameter):
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rates as they are now, by the names that they are logged under."""
    names = {"layers": "train/learning_rate", "vocabulary": "train/learning_rate_vocabulary"}
    return {names[group["part"]]: float(group["lr"]) for group in optimizer.param_groups}


def rate_factor(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """The learning rate of `step` (0 .. steps - 1) as a factor of its peak."""
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    start = steps - round(schedule.decay * steps) if schedule.shape == "wsd" else warmup
    progress = max(0.0, (step - start) / max(1, steps - 1 - start))
    if schedule.shape == "cosine":
        return schedule.final + (1 - schedule.final) * (1 + math.cos(math.pi * progress)) / 2
    return schedule.final + (1 - schedule.final) * (1 - progress)


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate becomes `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
