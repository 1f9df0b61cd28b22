"""Continual pretraining: token store, sharded model, loop, checkpoints."""

from cpt_merge.training.config import TrainingConfig

__all__ = ["TrainingConfig"]
