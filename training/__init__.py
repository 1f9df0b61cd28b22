"""Continual pretraining: token store, sharded model, loop, checkpoints."""

from cpt_merge.training.config import DataConfig, TrainingConfig

__all__ = ["DataConfig", "TrainingConfig"]
