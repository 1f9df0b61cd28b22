"""Phases: which steps train which weights.

For a new vocabulary it can pay to train only its rows first, then embedding and head, and then all
weights, so that rows which mean nothing yet do not disturb what the base knows (Kim et al.,
Efficient and Effective Vocabulary Expansion Towards Multilingual Large Language Models, 2024). Each
phase has a fresh optimizer and its own schedule; the stream of sequences continues, in a new order
if their length changes (`training/context.py`). A phase that changes nothing but the mixture keeps
both: moments and rates are about the weights, which stay the same. What a phase does not train
stays equal bit for bit:

- a weight that is not trained needs no gradient and is not given to the optimizer;
- an old row of a matrix whose new rows are trained gets a gradient of zero
  (`CausalLM.frozen_rows`), so that Adam's moments stay zero and its update is 0 / (0 + epsilon);
  the matrix does not decay in that phase.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from cpt_merge.training.config import TrainingConfig
from cpt_merge.training.context import Context
from cpt_merge.training.model.build import CausalLM, WeightSource
from cpt_merge.training.stretches import phase_bounds


@dataclass(frozen=True)
class Phase:
    """Steps [start, stop) of the run, and what they train."""

    number: int
    train: Literal["new_rows", "vocabulary", "all"]
    start: int
    stop: int
    learning_rate: float
    embedding_learning_rate: float
    context: Context

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.stop - self.start


@dataclass(frozen=True)
class PhaseSetup:
    """What the model and optimizer of a phase are built from."""

    config: TrainingConfig  # within the phase's context
    phase: Phase
    model: Path  # the checkpoint whose weights are loaded
    base_rows: int  # rows of the vocabulary before its extension, if only new rows are trained


def phases_of(config: TrainingConfig) -> list[Phase]:
    """The phases of a run, which divide its steps; a single one if the recipe names none.

    A phase that changes only the mixture belongs to the one before it. Raises `UserError` as
    `phase_bounds` does.
    """
    optimizer = config.optimizer
    rate, embedding_rate = (
        optimizer.learning_rate,
        optimizer.embedding_learning_rate or optimizer.learning_rate,
    )
    contexts = config.contexts
    if not config.phases:
        return [Phase(0, "all", 0, config.steps, rate, embedding_rate, contexts[0])]
    found: list[Phase] = []
    for place, (start, stop) in enumerate(phase_bounds(config)):
        phase = config.phases[place]
        if config.continues(place):
            found[-1] = replace(found[-1], stop=stop)
            continue
        own, own_embedding = phase.learning_rate or rate, phase.embedding_learning_rate
        own_embedding = own_embedding or phase.learning_rate or embedding_rate
        found.append(
            Phase(len(found), phase.train, start, stop, own, own_embedding, contexts[place])
        )
    return found


def prepare_phase(module: CausalLM, setup: PhaseSetup) -> None:
    """Adapters, if the phase trains them, and gradients of only what it trains.

    With `lora`, whatever is frozen is held in the compute type. The parameters have to be on the
    meta device.
    """
    config, phase = setup.config, setup.phase
    if config.lora and phase.train == "all":
        WeightSource.open(module, setup.model, torch.device("meta"))  # finds the names
        module.add_adapters(config.lora, config.seed)
    select_trained(module, phase, setup.base_rows)
    if config.lora and config.precision != "fp32":
        for parameter in module.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.bfloat16()


def select_trained(module: CausalLM, phase: Phase, base_rows: int) -> None:
    """Require gradients only of what the phase trains. `base_rows` as in `PhaseSetup`."""
    adapters = module.adapters.factors
    chosen_ids = {id(parameter) for parameter in vocabulary_matrices(module)}
    chosen_ids |= {id(p) for name, p in module.model.named_parameters() if name in adapters}
    for parameter in module.parameters():
        chosen = id(parameter) in chosen_ids or (phase.train == "all" and not adapters)
        # some families have parameters that are not trained by gradients (ERNIE's routers)
        parameter.requires_grad_(chosen and parameter.requires_grad)
    module.frozen_rows = base_rows if phase.train == "new_rows" else 0


def vocabulary_matrices(module: CausalLM) -> list[nn.Parameter]:
    """Embedding and head; the same matrix twice if they are tied."""
    return [module.model.get_input_embeddings().weight, module.model.get_output_embeddings().weight]
