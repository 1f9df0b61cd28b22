"""Continual pretraining: token store, sharded model, loop, checkpoints."""

from training.config import DataConfig, TrainingConfig

__all__ = ["DataConfig", "TrainingConfig"]
